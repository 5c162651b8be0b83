"""What does not go together is refused when it is put together: the key, the reason, what would work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lichen.algorithms.average import Average
from lichen.core.collecting.admission import Admission
from lichen.core.errors import LichenError
from lichen.server.lowrank.lowrank import FedEx
from lichen.server.mean import Mean
from lichen.server.schedules import Buffered, Synchronous
from lichen.transforms.clip_change import ClipChange
from lichen.transforms.downlink import WHOLE
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transform, Transformed
from lichen.transforms.uplink import Coded
from support import compressed_run
from support.small_experiment import experiment


@dataclass(frozen=True)
class Masked:
    """Messages that a server can only add up."""

    name: str = "masks"
    key: str = "wire.masks"
    composes: frozenset[Any] = frozenset({"sum"})
    remembers: bool = False

    def declared(self, expected: Any) -> Any:
        return expected

    def on_client(self, message: Any, own_C: Any, job: Any, clients: Any) -> Any:
        return message, {}

    def on_arrival(self, message: Any, expected: Any) -> Any:
        return message

    def on_total(self, change: Any, state: Any, *, clients: int, seed: int) -> Any:
        return change, {}, {}


CODED = Coded(parse_codecs(["int8"]))


def plan(*transforms: Transform, **more: Any) -> Average:
    made = experiment()
    work = Transformed(compressed_run.coded(made)["alone lr=0.1"].work, transforms)
    return compressed_run.average(
        made, admission=Admission(works={compressed_run.WORK: work}), **{"downlink": WHOLE, **more}
    )


def test_a_rule_that_looks_at_single_messages_is_refused_under_masks() -> None:
    with pytest.raises(
        LichenError, match=r"wire.masks: the aggregator needs single messages.*only their sum"
    ) as refused:
        plan(Masked(), aggregator=FedEx(2.0))
    assert "an aggregator that needs only a sum" in refused.value.fix
    plan(Masked(), aggregator=Mean())
    plan(ClipChange(1.0), Masked(), aggregator=Mean())
    plan(ClipChange(1.0), CODED, aggregator=FedEx(2.0))


def test_sums_cannot_be_taken_of_coded_rows_under_masks() -> None:
    with pytest.raises(LichenError, match=r"wire.masks: what comes before it is no sum"):
        plan(CODED, Masked(), aggregator=Mean())


@pytest.mark.parametrize("schedule", [Synchronous(deadline=9.0), Buffered(arrivals=2, concurrency=3, max_age=4)])
def test_error_feedback_is_refused_where_messages_may_come_too_late(schedule: Any) -> None:
    with pytest.raises(LichenError, match=r"wire.up: remembers what a message lost"):
        plan(CODED, schedule=schedule)
    plan(replace(CODED, error_feedback=False), schedule=schedule)
    plan(CODED, schedule=Synchronous())
