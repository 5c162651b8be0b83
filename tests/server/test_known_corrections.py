"""FedDyn's and FedNova's rounds equal the papers' algorithms, written here without the library's training or averaging.

Legend: B rows, F features, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen import fl
from lichen.clients.training.corrections.feddyn import FedDyn
from lichen.clients.training.corrections.fednova import Reach
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import ServerState
from lichen.core.conventions.reach import REACH, reach
from lichen.core.errors import LichenError
from lichen.core.rounds import run
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import TrainSource
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared
from lichen.recipes.schema.read import read_recipe
from lichen.server.heterogeneity.feddyn import ServerFedDyn, dynamic_mean
from lichen.server.heterogeneity.fednova import normalized
from lichen.server.mean import Mean
from support.small_experiment import RECIPE, engine, experiment
from support.toy_cohorts import Softmax

ROUNDS, CLIENTS, LR, ALPHA = 5, 5, 0.1, 0.3
Tree = dict[str, Tensor]


def softmax_grads(y: Tree, batch: Any) -> Tree:
    x_BF, label_B = batch["x_CBF"][0].double(), batch["labels_CB"][0]
    wrong_BK = (x_BF @ y["weight"].T + y["bias"]).softmax(-1) - torch.eye(3, dtype=torch.float64)[label_B]
    return {"weight": wrong_BK.T @ x_BF / len(label_B), "bias": wrong_BK.mean(0)}


def trained(
    tmp_path: Path, *, steps: tuple[Any, ...], invited: int, momentum: float = 0.0, source: Any = None, **server: Any
) -> tuple[ServerState, list[list[tuple[int, int]]], Any]:
    """State, who came with which seed, and the rows' source."""
    source = source or client_tasks(experiment(CLIENTS))["train lr=0.1"].source
    optimizer = fl.ClientOptimizer("sgd", lr=LR, momentum=momentum)
    work = fl.Train(Softmax(features=6), optimizer=optimizer, gradient_steps=steps)
    store, history = fl.ClientStore(tmp_path / "own"), History(tmp_path / "sent")
    block = 1 if isinstance(source, Unequal) else 2
    here = fl.LocalEngine({"train": fl.ClientTask(work=work, source=source)}, store, block_size=block)
    average = fl.Average(
        sampler=fl.Uniform(count=invited),
        weight_N=torch.ones(CLIENTS),
        rounds=ROUNDS,
        valid=None,
        history=history,
        **server,
    )
    state = run(average, here, lambda: Shared(Softmax(features=6).init(0)), rounds=ROUNDS, seed=3)
    came = [[(job.clients[0], job.seed) for _, job in history.messages(rounds=[r])] for r in history.rounds()]
    assert [len(one) for one in came] == [invited] * ROUNDS
    return state, came, source


def same(found: Tree, expected: Tree) -> None:
    start = Softmax(features=6).init(0)
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double(), x, rtol=1e-9, atol=1e-10)
        assert float((x - start[name]).abs().max()) > 0.01


@pytest.mark.parametrize("invited", [CLIENTS, 2])
def test_feddyn_as_the_paper_writes_it(tmp_path: Path, invited: int) -> None:
    state, came, source = trained(
        tmp_path,
        steps=(FedDyn(ALPHA),),
        invited=invited,
        aggregator=dynamic_mean(clients=CLIENTS),
        optimizer=ServerFedDyn(),
    )
    theta = {n: x.double() for n, x in Softmax(features=6).init(0).items()}
    h = {n: torch.zeros_like(x) for n, x in theta.items()}
    g = [dict(h) for _ in range(CLIENTS)]
    for clients in came:
        models = []
        for k, seed in clients:
            y = dict(theta)
            for batch in source.batches((k,), seed):
                grads = softmax_grads(y, batch)
                y = {n: y[n] - LR * (grads[n] - g[k][n] + ALPHA * (y[n] - theta[n])) for n in y}
            g[k] = {n: g[k][n] - ALPHA * (y[n] - theta[n]) for n in y}
            models.append(y)
        h = {n: h[n] - ALPHA / CLIENTS * sum(y[n] - theta[n] for y in models) for n in h}
        theta = {n: sum(y[n] for y in models) / len(models) - h[n] / ALPHA for n in theta}
    same(state.shared.trainable, theta)
    assert state.shared.frozen == {}


class Unequal:
    """Client k's batches of a round, of which it takes k + 1."""

    def __init__(self, inner: TrainSource) -> None:
        self.inner = inner

    def batches(self, clients: Any, seed: int) -> Any:
        (k,) = clients
        for at, batch in enumerate(self.inner.batches(clients, seed)):
            if at <= k:
                yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize(("momentum", "prox"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.7), (0.5, 0.2)])
def test_fednova_as_the_paper_writes_it(tmp_path: Path, momentum: float, prox: float) -> None:
    recipe = read_recipe(RECIPE, ["optimizer.lr=0.1", "federation.local_steps=5"])
    small = experiment(CLIENTS)
    plain = client_tasks(Experiment.of(recipe, small.model, small.clients))["train lr=0.1"].source
    steps = (*((fl.Proximal(prox),) if prox else ()), Reach(lr=LR, momentum=momentum, prox=prox))
    state, came, source = trained(
        tmp_path,
        steps=steps,
        invited=3,
        momentum=momentum,
        source=Unequal(plain),
        aggregator=normalized(Mean()),
        optimizer=fl.ServerSGD(),
    )
    theta = {n: x.double() for n, x in Softmax(features=6).init(0).items()}
    for clients in came:
        weights, reaches, directions = [], [], []
        for k, seed in clients:
            y, v, rows = dict(theta), {n: torch.zeros_like(x) for n, x in theta.items()}, 0
            ones: list[float] = []  # the coefficient of each step's gradient in the change
            for batch in source.batches((k,), seed):
                grads = softmax_grads(y, batch)
                v = {n: momentum * v[n] + grads[n] + prox * (y[n] - theta[n]) for n in y}
                y = {n: y[n] - LR * v[n] for n in y}
                rows += int((batch["labels_CB"] >= 0).sum())
                ones.append(1.0)
            # The coefficients by brute force: what a gradient of 1 at step t alone comes to at the end.
            coefficients = []
            for t in range(len(ones)):
                x = speed = 0.0
                for at in range(len(ones)):
                    speed = momentum * speed + (1.0 if at == t else 0.0) - LR * prox * x
                    x += speed
                coefficients.append(x)
            weights.append(float(rows))
            reaches.append(sum(coefficients))
            directions.append({n: (y[n] - theta[n]) / sum(coefficients) for n in y})
        share = [w / sum(weights) for w in weights]
        tau = sum(p * a for p, a in zip(share, reaches, strict=True))
        theta = {n: theta[n] + tau * sum(p * d[n] for p, d in zip(share, directions, strict=True)) for n in theta}
        assert len(set(reaches)) > 1
    same(state.shared.trainable, theta)


def test_the_reach_of_steps_of_momentum_is_the_papers() -> None:
    rho, tau = 0.9, 7
    assert reach(tau, momentum=rho)[-1] == pytest.approx((tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho))
    a = 0.1 * 0.5
    assert reach(tau, pull=a)[-1] == pytest.approx((1 - (1 - a) ** tau) / a)


def test_equal_steps_make_fednova_the_plain_mean_of_a_recipe(tmp_path: Path) -> None:
    found = {}
    for name in ("sgd", "fednova"):
        recipe = read_recipe(RECIPE, [f"optimizer={{name: {name}, lr: 0.1, momentum: 0.5}}"])
        small = experiment(CLIENTS)
        made = Experiment.of(recipe, small.model, small.clients)
        here, start = engine(made, tmp_path / name), initial_shared(made.server, LR)
        found[name] = run(algorithm_of(made.server, LR, 3), here, lambda start=start: start, rounds=3, seed=3)
    for name, x in found["sgd"].shared.trainable.items():
        torch.testing.assert_close(found["fednova"].shared.trainable[name], x, rtol=1e-5, atol=1e-6)


def test_a_message_without_a_reach_is_refused() -> None:
    ids, rule = torch.arange(2), normalized(Mean())
    message = fl.Message(
        group="g", client_C=ids, version_C=ids, tensors={"w": torch.ones(2, 3)}, weight_C=torch.ones(2).double()
    )
    with pytest.raises(LichenError, match="did not come"):
        rule.add(rule.zero(), message)
    nowhere = {"w": torch.ones(2, 3), REACH: torch.tensor([[1.0], [0.0]], dtype=torch.float64)}
    wrong = fl.Message(group="g", client_C=ids, version_C=ids, tensors=nowhere, weight_C=torch.ones(2).double())
    with pytest.raises(LichenError, match="its steps reach nowhere"):
        rule.add(rule.zero(), wrong)


@pytest.mark.parametrize("name", ["feddyn", "fednova"])
@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["wire.up=[int8]"], "wire"),
        (["federation.keep_optimizer=true"], "federation.keep_optimizer"),
        (["federation.fair=qffl"], "federation.fair"),
        (["federation.schedule={kind: buffered}", "engine.clock={median: 60}"], "federation.schedule.kind"),
        (["model={name: m}"], "optimizer.name"),  # the rule is then fedit
    ],
)
def test_what_they_do_not_go_with_is_refused_when_the_recipe_is_read(
    name: str, overrides: list[str], where: str
) -> None:
    recipe, words = {**RECIPE, "federation": {}}, [f"optimizer={{name: {name}, lr: 0.1}}"]
    read_recipe(recipe, words)
    with pytest.raises(LichenError) as caught:
        read_recipe(recipe, [*words, *overrides])
    assert caught.value.where.startswith(where)


def test_a_server_step_beside_feddyns_own_is_refused() -> None:
    with pytest.raises(LichenError, match=r"federation\.server"):
        read_recipe({**RECIPE, "federation": {}}, ["optimizer.name=feddyn", "federation.server={name: adam}"])
