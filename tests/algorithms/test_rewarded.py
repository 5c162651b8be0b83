"""Who gives what all give gets all of the change, who gives nothing gets least, and nobody else's model is changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen.algorithms.average import Average
from lichen.algorithms.rewarded import EachItsOwn, Rewarded
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.engines.local import LocalEngine
from lichen.present.clients import read_clients
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.schema.read import read_recipe
from lichen.server.fairness.cgsv import cosine, largest, reputations, rewarded, shares
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone
from support.small_experiment import experiment

KEYS = (
    "data.partition={by: dirichlet, alpha: 1.0, clients: 4}",
    "optimizer={name: sgd, lr: [0.1]}",
    "federation={rounds: 3, local_steps: 3, batch_size: 8, aggregate: mean, reward: cgsv}",
    "compare={baselines: [], metric: accuracy}",
)


class Zeros:
    """A training whose last client sends zeros."""

    def __init__(self, inner: Any, rider: int) -> None:
        self.inner, self.rider = inner, rider

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        message, own_C = self.inner.final(state)
        if self.rider in message.client_C.tolist():
            assert len(message.client_C) == 1  # each client has a job by itself
            message = replace(message, tensors=trees.zeros_like(message.tensors))
        return message, own_C


def engine(made: Experiment, folder: Path, *, rider: int = -1) -> LocalEngine:
    tasks, name = client_tasks(made), "train lr=0.1"
    tasks[name] = ClientTask(work=Zeros(tasks[name].work, rider), source=tasks[name].source)
    return LocalEngine(tasks, ClientStore(folder), block_size=3)


def algorithm(made: Experiment, folder: Path, beta: float = 1.0, *, paid: bool = True) -> Any:
    average = Average(
        aggregator=Mean("uniform"),
        optimizer=ServerSGD(),
        sampler=Everyone(),
        weight_N=made.server.roster.rows_N("train"),
        rounds=4,
        work="train lr=0.1",
        **({"downlink": EachItsOwn()} if paid else {}),
    )
    return Rewarded(rounds=average, beta=beta, spill=folder / "spill") if paid else average


def test_a_large_beta_pays_all_alike_and_everybody_has_the_model_of_plain_averaging(tmp_path: Path) -> None:
    made = experiment()
    plain = run(
        algorithm(made, tmp_path, paid=False), engine(made, tmp_path / "a"), lambda: made.start, rounds=3, seed=5
    )
    paid = run(algorithm(made, tmp_path, 1e9), engine(made, tmp_path / "b"), lambda: made.start, rounds=3, seed=5)
    for name, x in plain.shared.trainable.items():
        assert torch.equal(x, paid.shared.trainable[name])
        for model in paid.downlink[f"now/{name}"]:
            assert torch.equal(model, x)
    assert (paid.best_round, paid.best_value) == (plain.best_round, plain.best_value)


def test_who_sends_zeros_gets_least_and_the_best_gets_all(tmp_path: Path) -> None:
    made, reports = experiment(), []  # type: ignore[var-annotated]
    there = engine(made, tmp_path, rider=3)
    state = run(algorithm(made, tmp_path), there, lambda: made.start, rounds=3, seed=5, observers=[reports.append])
    reputation = state.downlink["reputation"].tolist()
    assert sum(reputation) == pytest.approx(1.0)
    assert min(range(4), key=reputation.__getitem__) == 3
    distance = [
        sum(float((state.downlink[f"now/{name}"][c] - x).norm()) for name, x in made.start.trainable.items())
        for c in range(4)
    ]
    assert min(range(4), key=distance.__getitem__) == 3
    assert all(0 < report.metrics["paid.least"] < report.metrics["paid.mean"] < 1 for report in reports)
    assert not list(tmp_path.rglob("spill/*"))


def test_a_client_has_the_server_s_step_where_it_is_paid_and_its_own_training_elsewhere() -> None:
    generator = torch.Generator().manual_seed(2)
    change, full, own = ({"w": torch.randn(5, 7, generator=generator)} for _ in range(3))
    model = rewarded(change, full, own, 0.4)["w"]
    paid = model == full["w"]
    assert int(paid.sum()) == 14
    assert torch.equal(model[~paid], own["w"][~paid])
    assert change["w"].abs()[paid].min() > change["w"].abs()[~paid].max()
    assert torch.equal(rewarded(change, full, own, 1.0)["w"], full["w"])
    assert torch.equal(rewarded(change, full, own, 0.0)["w"], own["w"])
    assert int(largest(torch.ones(9), 0.5).sum()) == 4


def test_reputations_follow_cosines_and_stay_for_who_did_not_come() -> None:
    zero_N = torch.zeros(3, dtype=torch.float64)
    assert cosine({"w": torch.zeros(3)}, {"w": torch.ones(3)}) == 0.0
    once = reputations(zero_N, {0: 1.0, 1: 1.0})
    assert once.tolist() == [0.5, 0.5, 0.0]
    twice = reputations(once, {0: 1.0})
    assert float(twice[0]) > float(twice[1]) > 0
    assert shares(twice, 1e9).tolist() == [1.0, 1.0, 0.0]
    near = shares(twice, 1e-6)
    assert torch.allclose(near, twice / twice.max(), atol=1e-9)
    with pytest.raises(LichenError, match="not positive"):
        shares(twice, 0.0)


def test_a_run_has_the_column_of_what_each_has_earned(tmp_path: Path) -> None:
    summary = lichen.run(read_recipe("digits", KEYS), out=tmp_path / "run").summary
    assert summary["extra_columns"]["personal"]["mean"] > 0
    assert all(row["personal"] is not None for row in read_clients(tmp_path / "run"))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        (("privacy={secure: true}",), "privacy.secure"),
        (("privacy={sigma: 1.0, clip: 1.0}", "data.valid=0"), "privacy"),
        (("federation.robust={rule: median}",), "federation.robust"),
        (("federation.clients_per_round=2",), "federation.clients_per_round"),
        (("federation.fair=qffl",), "federation.fair"),
        (("personal={kind: ditto}",), "personal"),
        (("value={kind: gtg}",), "value"),
        (("wire.down=[int8~]",), "wire.down"),
        (("optimizer.name=scaffold",), "federation.reward"),
        (("engine={name: distributed, nodes: 2}",), "engine.name"),
        (("federation.reward_beta=0",), "federation.reward_beta"),
        (("federation.reward=none", "federation.reward_beta=2.0"), "federation.reward_beta"),
    ],
)
def test_what_does_not_go_with_rewards_is_named(keys: tuple[str, ...], key: str) -> None:
    with pytest.raises(LichenError) as error:
        read_recipe("digits", (*KEYS, *keys))
    assert key in f"{error.value.where} {error.value.what}"
    assert error.value.fix
