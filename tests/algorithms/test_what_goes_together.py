"""What does not go together is refused when it is put together: the key, the reason, what would work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from lichen.algorithms.average import Average
from lichen.algorithms.plan import check_plan
from lichen.core.collecting.admission import Admission
from lichen.core.errors import LichenError
from lichen.declared import Need, Property
from lichen.recipes.assemble.aggregation import schedule_of
from lichen.recipes.assemble.parts import transforms_of
from lichen.recipes.schema.read import read_recipe
from lichen.server.allow_empty import AllowEmpty
from lichen.server.by_name import by_name
from lichen.server.fairness.qffl import QFFL
from lichen.server.lowrank.fedsvd import FedSVD
from lichen.server.lowrank.lowrank import FedEx, FedIT
from lichen.server.lowrank.stacking import FLoRA
from lichen.server.mean import Mean
from lichen.server.schedules import Buffered, Synchronous
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.downlink import WHOLE
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transform, Transformed
from lichen.transforms.uplink import Coded
from support import compressed_run
from support.noise import Noise
from support.small_experiment import experiment


@dataclass(frozen=True)
class Masked:
    """Messages that a server can only add up."""

    name: str = "masks"
    key: str = "wire.masks"
    needs: tuple[Need, ...] = (
        Need(
            Property.SUMS, "there is only a sum under masks, and {who} needs single messages", "leave one of them out"
        ),
    )
    lacks: frozenset[Property] = frozenset()

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
    with pytest.raises(LichenError, match=r"wire.masks: .* this aggregator needs single messages") as refused:
        plan(Masked(), aggregator=FedEx(2.0))
    assert refused.value.fix == "leave one of them out"
    plan(Masked(), aggregator=Mean())
    plan(ClipChange(1.0), Masked(), aggregator=Mean())
    plan(ClipChange(1.0), CODED, aggregator=FedEx(2.0))


def test_sums_cannot_be_taken_of_coded_rows_under_masks() -> None:
    for row in ((CODED, Masked()), (Masked(), CODED)):
        with pytest.raises(LichenError, match=r"wire.masks: .* wire.up needs single messages"):
            plan(*row, aggregator=Mean())


@pytest.mark.parametrize(
    "schedule",
    [
        Synchronous(deadline=9.0),
        Synchronous(least=2),
        Buffered(arrivals=2, concurrency=3, max_age=4),
        Buffered(arrivals=2, concurrency=3, deadline=9.0),
    ],
)
def test_what_remembers_elsewhere_than_in_private_state_is_refused_where_a_message_may_come_to_nothing(
    schedule: Any,
) -> None:
    elsewhere = Noise(0.1, lacks=frozenset({Property.LOST_ANSWERS}))
    with pytest.raises(LichenError, match=r"federation.schedule: with wire.noise a client remembers") as refused:
        plan(elsewhere, schedule=schedule)
    assert "leave out deadline, least and max_age" in refused.value.fix
    plan(CODED, schedule=schedule)
    plan(elsewhere, schedule=Synchronous())
    plan(elsewhere, schedule=Buffered(arrivals=2, concurrency=3))


@pytest.mark.parametrize(
    ("aggregator", "old"),
    [
        (Mean(), True),
        (FedIT(), True),
        (FedEx(scaling=2.0), False),
        (FLoRA(scaling=2.0), False),
        (FedSVD(), False),
        (QFFL(1.0, lr=0.1), False),
        (by_name({"": Mean(), "lora_": FedEx(scaling=2.0)}), False),
        (AllowEmpty(FedEx(scaling=2.0)), False),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_rule_that_holds_for_one_version_takes_no_old_answers(aggregator: Any, old: bool) -> None:
    def made(schedule: Any) -> None:
        check_plan(aggregator=aggregator, work=None, schedule=schedule)

    made(Synchronous())
    made(Buffered(arrivals=2, concurrency=3, max_age=0))
    if old:
        made(Buffered(arrivals=2, concurrency=3))
        return
    with pytest.raises(LichenError, match="this aggregator cannot fold in what was made for older tensors") as refused:
        made(Buffered(arrivals=2, concurrency=3))
    assert refused.value.where == "federation.schedule"
    assert "synchronous" in refused.value.fix


@pytest.mark.parametrize("wire", ["{}", "{clip: 1.0}", "{down: [int8]}", "{up: [int8]}", "{up: [int8], clip: 1.0}"])
@pytest.mark.parametrize(
    "schedule",
    [
        "{}",
        "{deadline: 90}",
        "{least: 2}",
        "{kind: buffered, arrivals: 2}",
        "{kind: buffered, arrivals: 2, max_age: 3}",
        "{kind: buffered, arrivals: 2, deadline: 90}",
    ],
)
def test_what_a_schedule_goes_with_goes_with_it_in_a_recipe_and_put_together(wire: str, schedule: str) -> None:
    clock, timed, coded = "engine.clock={median: 60}", f"federation.schedule={schedule}", f"wire={wire}"
    side = replace(experiment().server, recipe=read_recipe("digits", [clock, timed]))
    row = transforms_of(read_recipe("digits", [clock, coded]))
    read = read_recipe("digits", [clock, timed, coded])
    assert plan(*row, schedule=schedule_of(side)).schedule == schedule_of(replace(side, recipe=read))
