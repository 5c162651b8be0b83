"""Why a client that was asked does not count: one cause each, over training and validation, no longer than need be."""

from __future__ import annotations

import json
from dataclasses import replace

from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.core.machine import machine_fault
from lichen.core.replies import CAUSES, Attendance, Refusal
from lichen.core.wire.frames import pack_error, unpack_error
from lichen.present.clients import client_rows
from lichen.present.progress import attendance_text
from lichen.present.trace import Event, event_line, event_of
from lichen.recipes.withdrawal.traces.rewritten import without_number

REFUSED = (
    Refusal(client=4, reason="error", what="nobody is there", cause="gone"),
    Refusal(client=5, reason="shape", what="w is too long"),
    Refusal(client=6, reason="error", what="broke"),
    Refusal(client=7, reason="absent", what="never took part"),
    Refusal(client=8, reason="error", what="not here", cause="whatever"),
)


def event(attendance: Attendance) -> Event:
    report = Report(round=3, clients=tuple(range(3, 12)), metrics={}, attendance=attendance)
    return Event(column="federated", report=report, total_rounds=5, grid="")


def test_each_who_does_not_count_has_one_cause_and_those_who_count_have_none() -> None:
    attendance = Attendance.of(range(3, 12), [3, 9], REFUSED)
    assert attendance.causes == {
        "late": (10, 11),
        "gone": (4,),
        "failed": (6, 8),
        "not admitted": (5,),
        "absent": (7,),
    }
    assert set(attendance.causes) <= set(CAUSES)
    assert sum(map(len, attendance.causes.values())) == attendance.invited - attendance.arrived
    twice = Attendance.of([3], [3], [Refusal(client=3, reason="twice", what="again")])
    assert twice.causes == {}  # it counts, and what came after does not


def test_training_and_validation_stand_apart_and_a_trace_tells_them_again() -> None:
    trained = Attendance.of(range(3, 12), [3, 9], REFUSED) + Attendance.of([2], (), (), missing="given up")
    both = trained + Attendance.of([3, 9], [9], ()).judging()
    assert both.causes["given up"] == (2,)
    assert both.causes["validation: late"] == (3,)
    line = event_line(event(both))
    assert event_of(line).report.attendance == both
    assert event_of(event_line(event(Attendance.of([1], [1], ())))).report.attendance.causes == {}
    older = json.loads(line)
    del older["attendance"]["causes"]
    assert event_of(json.dumps(older).encode()).report.attendance == replace(both, causes={})
    shown = attendance_text(event(both))
    assert "late 2 (clients 10, 11), given up 1 (client 2)" in shown
    assert "validation: late 1 (client 3)" in shown


def test_a_roster_of_thousands_is_told_in_fewer_bytes_than_it_was_asked_in() -> None:
    everyone = tuple(range(5000))
    lost = Attendance.of(everyone, everyone[::2], [Refusal(client=c, reason="error", what="x" * 900) for c in (1, 3)])
    record = json.loads(event_line(replace(event(lost), report=replace(event(lost).report, clients=everyone))))
    assert len(json.dumps(record["attendance"]["causes"])) < len(json.dumps(record["clients"]))
    assert len(attendance_text(event(lost))) < 700


def test_a_client_that_is_taken_out_of_a_trace_is_in_no_cause() -> None:
    line = json.loads(event_line(event(Attendance.of(range(3, 12), [3, 9], REFUSED))))
    found = without_number(line, 4)["attendance"]["causes"]
    assert "gone" not in found
    assert found["late"] == [10, 11]


def test_a_site_may_say_that_it_declined_or_that_its_machine_did_and_no_other_word() -> None:
    fault = machine_fault(MemoryError())
    assert fault is not None
    assert unpack_error(pack_error(fault)).reason == "machine"
    assert unpack_error(pack_error(LichenError("no", reason="declined"))).reason == "declined"
    assert unpack_error(pack_error(LichenError("no", reason="late"))).reason == ""
    assert pack_error(LichenError("no", where="here", fix="that")) == b'["no", "here", "that"]'


def test_each_clients_rounds_are_added_up_and_nothing_stands_there_where_all_came() -> None:
    scores = {"federated": [1.0, 2.0, 3.0]}

    def report(attendance: Attendance, clients: tuple[int, ...] = (0, 1, 2)) -> Report:
        return Report(round=1, clients=clients, metrics={}, attendance=attendance)

    rounds = [
        report(Attendance.of((0, 1, 2), (0, 1, 2), ())),
        report(Attendance.of((0, 1, 2), (0,), [Refusal(client=2, reason="error", what="", cause="gone")])),
        report(Attendance.of((1, 2), (1,), ()) + Attendance.of((0, 1), (1,), ()).judging(), (1, 2)),
    ]
    rows = client_rows(["a", "b", "c"], [], scores, higher_is_better=True, rounds=rounds)
    assert [(row["invited"], row["counted"], row["why not"]) for row in rows] == [
        (2, 2, "validation: late 1"),
        (3, 2, "late 1"),
        (3, 1, "gone 1, late 1"),
    ]
    quiet = client_rows(["a", "b", "c"], [], scores, higher_is_better=True, rounds=rounds[:1])
    assert "invited" not in quiet[0]
    assert quiet == client_rows(["a", "b", "c"], [], scores, higher_is_better=True)
