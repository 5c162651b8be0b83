"""Whatever one client answers, it costs that client the round and nobody else anything.

Legend: C clients.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laws.test_aggregators import FAMILY, outcome
from lichen.core.collecting.admission import Admission, Limits
from lichen.core.collecting.collect import Collected, collect
from lichen.core.contracts.engine import Engine
from lichen.core.expected import COUNT, FAILED, LOSS, Expected, specs_of
from lichen.core.message import Job, Message, take_client
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.engines.around import AroundEngine
from lichen.engines.local import LocalEngine
from lichen.engines.spawned import SpawnedEngine
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.mean import Mean
from support import lying_node
from support.lies import HEAVY, LIES
from support.scripted_engine import ScriptedEngine
from support.small_experiment import experiment

CLIENTS = (0, 1, 2, 3)
COUNTS_ANYWAY = frozenset({"twice", "a thousand times"})
"""Lies whose first message is the truth."""
ROWS = 12.0
"""A client sees in a job of the small experiment, at most: three batches of four."""


def limits(task: str, client: int) -> Limits:
    return Limits(weight=ROWS, metrics={"tokens": ROWS, "count": ROWS, "steps": 3.0})


@pytest.fixture(scope="module")
def spawned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpawnedEngine]:
    command = [sys.executable, lying_node.__file__, str(tmp_path_factory.mktemp("nodes"))]
    with SpawnedEngine(command, nodes=2) as engine:
        yield engine


Sums = tuple[Collected, Collected]
"""Of everybody where nobody lies, and of all but the liar."""


def honest_sums(engine: Engine) -> Sums:
    return ask(engine, CLIENTS, 0), ask(engine, (0, 2, 3), 0)


@pytest.fixture(scope="module")
def sums_of_processes(spawned: SpawnedEngine) -> Sums:
    return honest_sums(spawned)


@pytest.fixture(scope="module")
def sums_here(tmp_path_factory: pytest.TempPathFactory) -> Sums:
    return honest_sums(local(tmp_path_factory.mktemp("here")))


def ask(engine: Engine, clients: tuple[int, ...], lie: int, work: str = "train lr=0.1") -> Collected:
    """What comes of one job when client 1 tells the lie of this number; 0: none."""
    made = experiment()
    works = {name: task.work for name, task in client_tasks(made).items()}
    settings = {"lr_scale": 1.0, "lie": float(lie)}
    job = Job(work=work, shared=made.start, version=3, clients=clients, seed=5, settings=settings)
    return collect(engine, [job], Mean(), admission=Admission(works=works, limits=limits))


def local(folder: Path) -> Engine:
    """The engine of this process, whose client 1 lies."""

    def on_reply(reply: Reply, job: Job) -> list[Reply]:
        lie, (client,) = int(job.settings["lie"]), reply.clients
        if not lie or client != lying_node.LIAR:
            return [reply]
        assert reply.message is not None
        return [replace(reply, message=message) for message in LIES[lying_node.ALL[lie - 1]](reply.message)]

    return AroundEngine(LocalEngine(client_tasks(experiment()), ClientStore(folder), block_size=1), on_reply=on_reply)


def held(came: Collected, name: str, honest: Collected, rest: Collected) -> None:
    """The lie was refused by name, and the sum has the bytes of the round it was not told in."""
    like = honest if name in COUNTS_ANYWAY else rest
    assert came.client_N.tolist() == like.client_N.tolist()
    assert digest({"units": came.total.units_N}) == digest({"units": like.total.units_N})
    assert (came.total.count, came.total.weight) == (like.total.count, like.total.weight)
    assert sum(came.attendance.refused.values()) >= 1
    assert {refusal.client for refusal in came.attendance.named} == {lying_node.LIAR}
    assert came.attendance.missing == ()
    assert all(len(refusal.what) < 500 for refusal in came.attendance.named)


@pytest.mark.parametrize("name", LIES)
def test_a_lie_costs_the_liar_the_round(name: str, sums_here: Sums, tmp_path: Path) -> None:
    assert sums_here[0].attendance.summary() == ""
    held(ask(local(tmp_path), CLIENTS, lying_node.ALL.index(name) + 1), name, *sums_here)


@pytest.mark.parametrize("name", lying_node.ALL)
def test_a_lie_of_a_process_costs_it_the_round(name: str, spawned: SpawnedEngine, sums_of_processes: Sums) -> None:
    held(ask(spawned, CLIENTS, lying_node.ALL.index(name) + 1), name, *sums_of_processes)


VALIDATION = ["a loss of a billion", "a loss of minus a billion", "NaN loss", "fewer rows than none", "no metrics"]


@pytest.mark.parametrize("name", VALIDATION)
def test_a_lie_in_validation_moves_nothing(name: str, tmp_path: Path) -> None:
    engine = local(tmp_path)
    rest = ask(engine, (0, 2, 3), 0, "valid")
    came = ask(engine, CLIENTS, lying_node.ALL.index(name) + 1, "valid")
    assert came.client_N.tolist() == [0, 2, 3]
    assert {name: x.tolist() for name, x in came.metrics.items()} == {n: x.tolist() for n, x in rest.metrics.items()}
    assert sum(came.attendance.refused.values()) == 1


class Declared:
    """Declares messages like one that was seen."""

    def __init__(self, message: Message) -> None:
        known = {"loss_sum": LOSS, "count": COUNT, "failed": FAILED, "tokens": COUNT}
        tensors = specs_of({name: x[0] for name, x in message.tensors.items()})
        self.message = Expected(
            group=message.group, tensors=tensors, metrics={name: known[name] for name in message.metrics}
        )

    def expected(self, job: Job) -> Expected:
        return self.message


@pytest.mark.parametrize("rule", FAMILY)
def test_no_aggregator_is_moved_by_a_lie(rule: str) -> None:
    member, make = FAMILY[rule]
    zero = torch.zeros(4, dtype=torch.float64)
    made = make(4, 1)
    metrics = {"loss_sum": zero + 2, "count": zero + 4, "failed": zero, "tokens": zero + 4, **made.metrics}
    metrics["count"] = zero + 9 if "count" in made.metrics else metrics["count"]
    message = replace(made, client_C=torch.arange(4), version_C=torch.full((4,), 3), weight_C=zero + 5, metrics=metrics)
    admission = Admission(
        works={"any": Declared(message)}, limits=lambda task, client: replace(limits("", 0), weight=9)
    )
    ones = [take_client(message, c) for c in range(4)]
    job = Job(work="any", shared=Shared(), version=3, clients=CLIENTS, seed=0)

    def total(lie: Any) -> Collected:
        replies = [((c,), one) for c in CLIENTS for one in (lie(ones[c]) if c == 1 else [ones[c]])]
        return collect(ScriptedEngine(lambda _: replies), [job], member, admission=admission)

    rest, honest = total(lambda _: []), total(lambda one: [one])
    assert rest.attendance.missing == (1,)
    for name in LIES.keys() - HEAVY:
        try:
            came = total(LIES[name])
        except (RuntimeError, IndexError):  # such a message cannot be made of these tensors
            continue
        like = honest if name in COUNTS_ANYWAY else rest
        if came.attendance.summary() == "":  # the lie is the truth here, as float64 where that is meant
            assert name in ("float64",), (rule, name)
            continue
        assert repr(outcome(member, came.total)) == repr(outcome(member, like.total)), (rule, name)
        assert {refusal.client for refusal in came.attendance.named} == {1}, (rule, name)
