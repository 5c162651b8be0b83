"""SCAFFOLD's rounds equal the paper's algorithm, written here without any of the library's training or averaging.

Legend: B rows, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen import fl
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import ServerState
from lichen.core.errors import LichenError
from lichen.core.rounds import run
from lichen.core.wire.shared import CONTROL, Shared
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared, tensors_of
from lichen.recipes.schema.read import read_recipe
from lichen.server.heterogeneity.scaffold import controlled, with_controls
from lichen.server.mean import Mean
from support.small_experiment import RECIPE, engine, experiment
from support.toy_cohorts import Softmax

ROUNDS, CLIENTS, LR = 6, 5, 0.1
Grads = Callable[[dict[str, Tensor], Any], dict[str, Tensor]]


def paper(
    x: dict[str, Tensor], rounds: Any, batches: Any, grads: Grads, *, server_lr: float, decay: float = 0.0
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Algorithm 1 with option II, in float64: (x, c, every c_k) after rounds of these clients."""
    x = {n: v.double() for n, v in x.items()}
    c = {n: torch.zeros_like(v) for n, v in x.items()}
    c_k = [dict(c) for _ in range(CLIENTS)]
    for clients in rounds:
        y_k, new_k = {}, {}
        for k, seed in clients:
            y, steps = dict(x), 0
            for batch in batches(k, seed):
                g = grads(y, batch)
                y = {n: y[n] - LR * (g[n] + decay * y[n] - c_k[k][n] + c[n]) for n in y}
                steps += 1
            y_k[k], new_k[k] = y, {n: c_k[k][n] - c[n] + (x[n] - y[n]) / (steps * LR) for n in y}
        moved = {n: sum(new_k[k][n] - c_k[k][n] for k in new_k) for n in c}
        x = {n: x[n] + server_lr * sum(y[n] - x[n] for y in y_k.values()) / len(y_k) for n in x}
        c = {n: c[n] + moved[n] / CLIENTS for n in c}
        for k, new in new_k.items():
            c_k[k] = new
    return x, c, c_k


def softmax_grads(y: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    x_BF, label_B = batch["x_CBF"][0].double(), batch["labels_CB"][0]
    wrong_BK = (x_BF @ y["weight"].T + y["bias"]).softmax(-1) - torch.eye(3, dtype=torch.float64)[label_B]
    return {"weight": wrong_BK.T @ x_BF / len(label_B), "bias": wrong_BK.mean(0)}


def network_grads(y: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """One hidden layer of ReLU, by hand."""
    (w1, b1), (w2, b2) = ((f"{name}.weight", f"{name}.bias") for name in sorted({n.rpartition(".")[0] for n in y}))
    x_BF, label_B = batch["x_CBF"][0].double(), batch["labels_CB"][0]
    x_BF, label_B = x_BF[label_B >= 0], label_B[label_B >= 0]
    inside_BH = x_BF @ y[w1].T + y[b1]
    hidden_BH = inside_BH.clamp(min=0)
    wrong_BK = (hidden_BH @ y[w2].T + y[b2]).softmax(-1) - torch.eye(3, dtype=torch.float64)[label_B]
    back_BH = wrong_BK @ y[w2] * (inside_BH > 0)
    out = {w1: back_BH.T @ x_BF, b1: back_BH.sum(0), w2: wrong_BK.T @ hidden_BH, b2: wrong_BK.sum(0)}
    return {n: g / len(label_B) for n, g in out.items()}


def asked(history: History) -> list[list[tuple[int, int]]]:
    """Who came in each round, with the seed of the job."""
    return [[(job.clients[0], job.seed) for _, job in history.messages(rounds=[r])] for r in history.rounds()]


def same(state: ServerState, kept: Any, expected: Any, *, within: float) -> None:
    x, c, c_k = expected
    found, control = state.shared.trainable, state.shared.group(CONTROL)
    assert found.keys() == control.keys() == x.keys()
    for name in x:
        torch.testing.assert_close(found[name].double(), x[name], rtol=within, atol=within)
        torch.testing.assert_close(control[name].double(), c[name], rtol=within, atol=within)
        for k in range(CLIENTS):
            own = kept(k)
            mine = own[f"step/scaffold/{name}"][0].double() if own else torch.zeros_like(c[name])
            torch.testing.assert_close(mine, c_k[k][name], rtol=within, atol=within)
        torch.testing.assert_close(torch.stack([one[name] for one in c_k]).mean(0), c[name], rtol=1e-9, atol=1e-12)
    assert any(v.abs().max() > 0.05 for v in c.values())


@pytest.mark.parametrize("server_lr", [1.0, 0.4])
@pytest.mark.parametrize("invited", [CLIENTS, 2])
def test_a_convex_problem(tmp_path: Path, server_lr: float, invited: int) -> None:
    made, model = experiment(CLIENTS), Softmax(features=6)
    source = client_tasks(made)["train lr=0.1"].source
    work = fl.Train(model, optimizer=fl.ClientOptimizer("sgd", lr=LR), gradient_steps=(fl.Scaffold(LR),))
    store, history = fl.ClientStore(tmp_path / "own"), History(tmp_path / "sent")
    here = fl.LocalEngine({"train": fl.ClientTask(work=work, source=source)}, store, block_size=2)
    average = fl.Average(
        aggregator=controlled(Mean("uniform"), clients=CLIENTS),
        optimizer=fl.ServerSGD(lr=server_lr),
        sampler=fl.Uniform(count=invited),
        weight_N=torch.ones(CLIENTS),
        rounds=ROUNDS,
        valid=None,
        history=history,
    )
    start = with_controls(Shared(model.init(0)))
    state = run(average, here, lambda: start, rounds=ROUNDS, seed=3)

    def batches(k: int, seed: int) -> Any:
        return source.batches((k,), seed)

    rounds = asked(history)
    assert [len(one) for one in rounds] == [invited] * ROUNDS
    expected = paper(model.init(0), rounds, batches, softmax_grads, server_lr=server_lr)
    same(state, lambda k: store.load((k,), ROUNDS), expected, within=1e-9)


@pytest.mark.parametrize("server_lr", [1.0, 0.4])
def test_a_recipes_network(tmp_path: Path, server_lr: float) -> None:
    recipe = read_recipe(
        RECIPE,
        [
            "optimizer={name: scaffold, lr: 0.1, clip: null, weight_decay: 0.02}",
            "federation.weighting=uniform",
            "federation.clients_per_round=3",
            f"federation.server.lr={server_lr}",
        ],
    )
    small = experiment(CLIENTS)
    made = Experiment.of(recipe, small.model, small.clients)
    source, here = client_tasks(made)["train lr=0.1"].source, engine(made, tmp_path / "own")
    history, start = History(tmp_path / "sent"), initial_shared(made.server, LR)
    average = replace(algorithm_of(made.server, LR, ROUNDS), history=history)
    state = run(average, here, lambda: start, rounds=ROUNDS, seed=3)
    rounds = asked(history)
    assert [len(one) for one in rounds] == [3] * ROUNDS
    trained = dict(start.trainable)
    expected = paper(
        trained, rounds, lambda k, seed: source.batches((k,), seed), network_grads, server_lr=server_lr, decay=0.02
    )
    store = fl.ClientStore(tmp_path / "own")
    same(state, lambda k: store.load((k,), ROUNDS), expected, within=1e-6)
    assert tensors_of(made.server, LR, state.shared) == Shared(state.shared.trainable)


def test_validation_is_sent_no_control(tmp_path: Path) -> None:
    """Twice the tensors come down for training, and once for validation."""
    sizes = {}
    for name in ("sgd", "scaffold"):
        recipe = read_recipe(RECIPE, [f"optimizer={{name: {name}, lr: 0.1}}"])
        small = experiment(CLIENTS)
        made = Experiment.of(recipe, small.model, small.clients)
        there, start = engine(made, tmp_path / name), initial_shared(made.server, LR)
        reports: list[Any] = []
        run(
            algorithm_of(made.server, LR, 1),
            there,
            lambda start=start: start,
            rounds=1,
            seed=3,
            observers=[reports.append],
        )
        (sizes[name],) = reports
    plain, twice = sizes["sgd"], sizes["scaffold"]
    bytes_of = sum(x.nbytes for x in experiment(CLIENTS).start.trainable.values()) * CLIENTS
    assert (plain.valid_down, plain.valid_up) == (twice.valid_down, twice.valid_up)
    for more in (twice.bytes_up - plain.bytes_up, twice.bytes_down - plain.bytes_down):
        assert bytes_of <= more <= bytes_of + 4 * CLIENTS * 100  # names of four tensors


def test_a_server_without_control_variates_says_so() -> None:
    rule = controlled(Mean(), clients=2)
    ids = torch.arange(2)
    message = fl.Message(
        group="g",
        client_C=ids,
        version_C=ids,
        tensors={"w": torch.ones(2, 3), "control.w": torch.ones(2, 3)},
        weight_C=torch.ones(2, dtype=torch.float64),
    )
    total = rule.add(rule.zero(), message)
    change, metrics = rule.close(total, with_controls(Shared({"w": torch.zeros(3)})))
    assert torch.equal(change.frozen["control.w"], torch.ones(3))
    assert metrics == {"clients": 2.0, "weight": 2.0}
    with pytest.raises(LichenError, match="has no tensor"):
        rule.close(total, Shared({"w": torch.zeros(3)}))


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer.prox=0.1"], "optimizer.prox"),
        (["wire.up=[int8]"], "wire"),
        (["wire.down=[int8]"], "wire"),
        (["wire.clip=1"], "wire"),
        (["federation.keep_optimizer=true"], "federation.keep_optimizer"),
        (["federation.fair=qffl"], "federation.fair"),
        (["federation.fair=minmax"], "federation.fair"),
        (["federation.schedule={kind: buffered}", "engine.clock={median: 60}"], "federation.schedule.kind"),
        (["model={name: m}"], "optimizer.name"),  # the rule is then fedit
    ],
)
def test_what_it_does_not_go_with_is_refused_when_the_recipe_is_read(overrides: list[str], where: str) -> None:
    recipe = {**RECIPE, "federation": {}}
    read_recipe(recipe, ["optimizer={name: scaffold, lr: 0.1}"])
    with pytest.raises(LichenError) as told:
        read_recipe(recipe, ["optimizer={name: scaffold, lr: 0.1}", *overrides])
    assert told.value.where == where
