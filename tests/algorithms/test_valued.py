"""Valuing a round changes nothing of it, and shares out the loss of the models that coalitions would have made."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.algorithms.scores import score
from lichen.algorithms.valued import Valued
from lichen.clients.evaluation.gradient import Gradient
from lichen.core.collecting.admission import OPEN
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.around import ForwardingEngine
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone
from support.small_experiment import experiment


def engine(made: Experiment, folder: Path) -> LocalEngine:
    """The local engine, whose clients also take gradients of their validation rows."""
    valid = made.evaluating(made.clients.valid)
    gradient = ClientTask(work=Gradient(made.model), source=valid)
    return LocalEngine({**client_tasks(made), "gradient": gradient}, ClientStore(folder), block_size=3)


def average(made: Experiment, **more: Any) -> Average:
    plain: dict[str, Any] = {
        "aggregator": Mean(),
        "optimizer": ServerSGD(),
        "sampler": Everyone(),
        "weight_N": made.server.roster.rows_N("train"),
        "rounds": 4,
        "work": "train lr=0.1",
    }
    return Average(**{**plain, **more})


def valued(made: Experiment, folder: Path, kind: Any = "exact", rounds: Average | None = None, **more: Any) -> Valued:
    whole = {"judges": (0, 1, 2, 3), "admission": OPEN, "spill": folder / "spill", **more}
    return Valued(rounds=rounds or average(made), kind=kind, **whole)


def loss(made: Experiment, folder: Path, shared: Shared) -> float:
    job = Job(work="valid", shared=shared, version=0, clients=(0, 1, 2, 3), seed=0)
    metrics = score(engine(made, folder), job)[1]
    return float(metrics["loss_sum"].sum() / metrics["count"].sum())


@pytest.mark.parametrize("kind", ["exact", "gtg", "first", "loo"])
def test_a_round_is_the_same_and_its_worth_is_that_of_the_models_before_and_after(tmp_path: Path, kind: Any) -> None:
    made = experiment()
    plain = average(made).round(average(made).init(made.start), engine(made, tmp_path / "plain"), 7)
    there = engine(made, tmp_path / "valued")
    algorithm = valued(made, tmp_path, kind)
    state, report = algorithm.round(algorithm.init(made.start), there, 7)
    assert all(torch.equal(state.shared.flat()[name], x) for name, x in plain[0].shared.flat().items())
    assert (state.best_round, state.best_value) == (plain[0].best_round, plain[0].best_value)
    value = report.value
    assert value is not None
    assert list(value.value) == [0, 1, 2, 3]
    near = 1e-6 if kind == "first" else 1e-12  # a gradient's loss is summed up in the model's precision
    assert value.before == pytest.approx(-loss(made, tmp_path / "a", made.start), abs=near)
    assert value.after == pytest.approx(-loss(made, tmp_path / "b", state.shared), abs=1e-12)
    assert kind not in ("exact", "gtg") or abs(value.gap) <= 1e-12
    assert (report.bytes_up, report.bytes_down) == (there.bytes_up, there.bytes_down)
    assert report.bytes_up - report.valid_up == plain[1].bytes_up - plain[1].valid_up
    assert report.valid_down > plain[1].valid_down
    assert not list(tmp_path.rglob("spill/*"))


def test_first_order_and_leaving_out_come_near_exact_values_of_small_steps(tmp_path: Path) -> None:
    made = experiment()
    found = {}
    for kind in ("exact", "first", "loo"):
        small = average(made, optimizer=ServerSGD(lr=0.01))
        algorithm = valued(made, tmp_path / kind, kind, small)
        report = algorithm.round(algorithm.init(made.start), engine(made, tmp_path / kind), 7)[1]
        assert report.value is not None
        found[kind] = report.value.value
    for kind in ("first", "loo"):
        for client, value in found["exact"].items():
            assert found[kind][client] == pytest.approx(value, rel=0.02)


def test_every_second_round_is_valued_and_a_resumed_run_gives_the_same_values(tmp_path: Path) -> None:
    made, whole, again = experiment(), [], []  # type: ignore[var-annotated]
    algorithm = valued(made, tmp_path, "gtg", every=2)
    run(algorithm, engine(made, tmp_path / "w"), lambda: made.start, rounds=4, seed=3, observers=[whole.append])
    file = tmp_path / "state.safetensors"
    for rounds in (1, 4):
        there = engine(made, tmp_path / "r")
        run(algorithm, there, lambda: made.start, rounds=rounds, seed=3, checkpoint=file, observers=[again.append])
    assert [report.value is not None for report in whole] == [False, True, False, True]
    assert [report.value for report in whole] == [report.value for report in again]


class Forgetful(ForwardingEngine):
    """A client that validates twice and is then gone."""

    def __init__(self, inner: LocalEngine) -> None:
        self.inner = inner
        self.asked = 0

    def submit(self, job: Job) -> int:
        self.asked += job.work == "valid"
        late = job.work == "valid" and self.asked > 2
        return self.inner.submit(replace(job, clients=job.clients[:-1]) if late else job)

    def replies(self, numbers: Collection[int], until: float = float("inf")) -> Iterator[Reply]:
        return self.inner.replies(numbers, until)

    def cancel(self, number: int) -> None:
        self.inner.cancel(number)


def test_a_judge_that_leaves_ends_the_values_of_the_round_and_not_the_round(tmp_path: Path) -> None:
    made = experiment()
    algorithm = valued(made, tmp_path)
    state, report = algorithm.round(algorithm.init(made.start), Forgetful(engine(made, tmp_path)), 7)
    assert (state.round, report.value) == (1, None)


def test_a_gradient_is_that_of_the_mean_loss_over_all_rows(tmp_path: Path) -> None:
    made, there, mean = experiment(), engine(experiment(), tmp_path), Mean()
    job = Job(work="gradient", shared=made.start, version=0, clients=(0, 1, 2, 3), seed=0)
    total = mean.zero()
    number = there.submit(job)
    for reply in there.replies((number,)):
        assert reply.message is not None
        assert OPEN.admit(reply, job, Gradient(made.model).expected(job), set())[1] == []
        total = mean.add(total, reply.message)
    gradient: Tree = mean.close(total, made.start)[0].trainable
    name = max(gradient, key=lambda one: float(gradient[one].abs().max()))
    place = int(gradient[name].abs().flatten().argmax())
    moved = {}
    for step in (-1e-2, 1e-2):
        x = made.start.trainable[name].clone()
        x.view(-1)[place] += step
        moved[step] = loss(made, tmp_path / f"{step}", made.start | Shared({name: x}))
    slope = (moved[1e-2] - moved[-1e-2]) / 2e-2
    assert float(gradient[name].flatten()[place]) == pytest.approx(slope, rel=1e-2)
