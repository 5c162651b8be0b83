"""FedAsync: every step is the mixture that the paper's line says, against a loop that knows nothing of engines."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_average import average, same
from test_buffered import ByHand, clock, downlink, finished

from lichen.algorithms.average import Average
from lichen.core.contracts.algorithm import ServerState
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.rounds import run
from lichen.core.wire.shared import Shared
from lichen.recipes.schema.read import read_recipe
from lichen.server.mixing import mixed, one_job
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone, Uniform
from lichen.server.schedules import Buffered
from support.small_experiment import experiment

ASYNC = Buffered(arrivals=1, concurrency=5, mixing=0.6)


def weight(age: int, *, exponent: float = 0.5, hinge: int | None = None) -> float:
    """The paper's s, written out."""
    if hinge is None:
        return 1.0 / math.pow(age + 1, exponent)
    return 1.0 if age <= hinge else 1.0 / (exponent * (age - hinge) + 1)


@pytest.mark.parametrize("hinge", [None, 2])
def test_three_clients_by_hand(hinge: int | None) -> None:
    made = experiment(3)
    algorithm = average(
        made,
        sampler=Everyone(),
        schedule=Buffered(arrivals=1, concurrency=3, mixing=0.6, hinge=hinge),
        optimizer=ServerSGD(),
        valid=None,
        rounds=9,
    )
    state, there = ServerState(round=0, shared=Shared({"w": torch.zeros(1, dtype=torch.float64)})), ByHand()
    found = []
    for r in range(8):
        state, _ = algorithm.round(state, there, r)
        found.append(float(state.shared.trainable["w"]))
    # The same events in a loop of its own: who comes next, what it began with, what it adds to that.
    w, versions, change, after = 0.0, [0.0], {0: 1.0, 1: 2.0, 2: 4.0}, {0: 1.0, 1: 1.5, 2: 2.7}
    due, wanted = [(after[c], 0, c) for c in range(3)], []
    for step in range(8):
        due.sort()
        time, version, client = due.pop(0)
        share = 0.6 * weight(step - version, hinge=hinge)
        w = (1 - share) * w + share * (versions[version] + change[client] + version)
        versions.append(w)
        due.append((time + after[client], step + 1, client))
        wanted.append(w)
    assert found == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("down", [None, "int8"])
def test_every_step_of_a_trained_run_is_the_mixture(tmp_path: Path, down: str | None) -> None:
    made = experiment(9)
    came: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def look(reply: Reply, job: Job) -> tuple[Reply, ...]:
        if job.work.startswith("train") and reply.message is not None:
            for place, client in enumerate(reply.clients):
                began, change = job.shared.trainable, reply.message.tensors
                came[client, job.version] = {n: began[n].double() + change[n][place].double() for n in change}
        return (reply,)

    algorithm = average(made, sampler=Uniform(5), schedule=ASYNC, downlink=downlink(down), rounds=10)
    there = clock(made, tmp_path, look, median=20, sigma=1.5)
    state, ages = algorithm.init(made.start), set[int]()
    w = {name: x.double() for name, x in made.start.trainable.items()}
    for r in range(10):
        state, report = algorithm.round(state, there, r)
        ((client, version, *_),) = report.attendance.receipts[:1]
        share = 0.6 * weight(r - version)
        ages.add(r - version)
        w = {name: (1 - share) * w[name] + share * x for name, x in came[client, version].items()}
        for name, x in state.shared.trainable.items():
            assert torch.allclose(x.double(), w[name], atol=1e-6)
    assert max(ages) >= 3


def test_all_of_a_fresh_model_is_the_step_of_a_buffer_of_one(tmp_path: Path) -> None:
    made = experiment(6)
    alone: dict[str, Any] = {"arrivals": 1, "concurrency": 1}
    states = [
        finished(
            average(made, sampler=Uniform(1), schedule=Buffered(**alone, mixing=mixing)),
            made,
            clock(made, tmp_path / str(mixing), median=5),
        )[0]
        for mixing in (None, 1.0)
    ]
    assert same(states[0].shared.flat(), states[1].shared.flat())


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    made = experiment(9)
    algorithm: Average = average(made, sampler=Uniform(5), schedule=replace(ASYNC, max_age=6, deadline=200.0))
    delays: dict[str, Any] = {"median": 20, "sigma": 1.5, "dropout": 0.1}
    finished(algorithm, made, clock(made, tmp_path / "a", **delays), file=tmp_path / "whole", rounds=8)
    for rounds in (3, 8):
        there = clock(made, tmp_path / "b", **delays)
        shorter = replace(algorithm, rounds=8)
        run(shorter, there, lambda: made.start, rounds=rounds, seed=3, checkpoint=tmp_path / "part")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "part").read_bytes()


def test_what_cannot_be_mixed_is_refused() -> None:
    for words in ({"arrivals": 2}, {"mixing": 0.0}, {"mixing": 1.5}, {"hinge": -1}):
        with pytest.raises(LichenError):
            Buffered(**{"arrivals": 1, "concurrency": 4, "mixing": 0.6, **words})  # type: ignore[arg-type]
    w, other = Shared({"w": torch.ones(2)}), Shared({"w": torch.ones(3)})
    for change, began, shared in ((other, w, w), (w, Shared(), w), (w, w, Shared())):
        with pytest.raises(LichenError, match="began with"):
            mixed(change, began, shared, 0.5)
    with pytest.raises(LichenError, match="one by one"):
        one_job([], [1, 2], [0, 0])


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("federation.schedule.arrivals=2",), "federation.schedule.mixing"),
        (("federation.server.lr=0.5",), "federation.server"),
        (("federation.server.name=adam",), "federation.server"),
        (("federation.robust={rule: median, liars: 0}",), "federation.schedule"),
    ],
)
def test_a_recipe_says_what_does_not_go_with_it(words: tuple[str, ...], where: str) -> None:
    base = (
        "federation.schedule={kind: buffered, arrivals: 1, concurrency: 5, mixing: 0.6, hinge: 4}",
        "engine.clock={median: 60}",
    )
    assert read_recipe("digits", base).federation.schedule.mixing == 0.6
    with pytest.raises(LichenError) as caught:
        read_recipe("digits", (*base, *words))
    assert str(caught.value.where).startswith(where)
