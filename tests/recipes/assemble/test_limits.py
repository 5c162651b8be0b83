"""What a client can bring at most: no honest one is refused, in any way of weighing; who claims more is, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.collecting.collect import collect
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.engines.around import AroundEngine
from lichen.recipes.assemble.column import admission_of
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.sides.limits import limits_of
from lichen.server.mean import Mean
from support.small_experiment import engine, experiment

TASKS = ("train lr=0.1", "valid", "test")


def weighing(**changes: Any) -> Experiment:
    made = experiment()
    fed = made.recipe.federation.model_copy(update=changes)
    return made.with_server(recipe=made.recipe.model_copy(update={"federation": fed}))


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, (12, 12, 3)),
        ({"weighting": "rows"}, (10, 12, 3)),
        ({"weighting": "uniform"}, (12, 12, 3)),
        ({"local_steps": None, "local_epochs": 2}, (20, 20, 6)),
        ({"gradient_accumulation_steps": 2}, (24, 24, 3)),
    ],
)
def test_limits_are_what_steps_and_passes_see(changes: Any, most: tuple[int, ...], tmp_path: Path) -> None:
    """Client 1 has ten rows, and five of each other part."""
    made = weighing(**changes)
    limits = limits_of(made.server)
    train = limits("train lr=0.1", 1)
    assert (train.weight, train.metrics["count"], train.metrics["steps"]) == most
    assert (limits("valid", 1).weight, limits("test", 1).metrics) == (5, {"count": 5})
    there, admission = engine(made, tmp_path), admission_of(made.server)
    for work in TASKS:
        job = Job(work=work, shared=made.start, version=0, clients=(0, 1, 2, 3), seed=5)
        assert admission.expected(job) is not None
        assert not collect(there, [job], admission=admission).attendance.refused


def claiming(part: str, factor: float) -> Any:
    """Client 1 says that it has seen more than it has."""

    def changed(message: Message) -> Message:
        x_C = torch.where(message.client_C == 1, factor, 1.0).double()
        if part == "weight":
            return replace(message, weight_C=message.weight_C * x_C)
        return replace(message, metrics={**message.metrics, part: message.metrics[part] * x_C})

    def on_reply(reply: Reply, job: Job) -> tuple[Reply]:
        return (reply if reply.message is None else replace(reply, message=changed(reply.message)),)

    return on_reply


@pytest.mark.parametrize("work", TASKS)
@pytest.mark.parametrize(("part", "reason"), [("weight", "weight"), ("count", "metric")])
def test_who_claims_more_is_refused_and_nobody_else(work: str, part: str, reason: str, tmp_path: Path) -> None:
    made = experiment()
    lying = AroundEngine(engine(made, tmp_path), on_reply=claiming(part, 100.0))
    job = Job(work=work, shared=made.start, version=0, clients=(0, 1, 2, 3), seed=5)
    came = collect(lying, [job], Mean() if work == TASKS[0] else None, admission=admission_of(made.server))
    assert came.client_N.tolist() == [0, 2, 3]
    (refusal,) = came.attendance.named
    assert (refusal.client, refusal.reason) == (1, reason)
    assert "this client can" in refusal.what
