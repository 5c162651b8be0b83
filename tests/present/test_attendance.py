"""Who came to a round, and what was refused, is told wherever a round or a run is."""

from __future__ import annotations

from pathlib import Path

from lichen.core.contracts.algorithm import Report
from lichen.core.replies import Attendance, Refusal
from lichen.present.progress import attendance_text
from lichen.present.report import summary_table
from lichen.present.summary import attendance_of
from lichen.present.table import table_text
from lichen.present.trace import Event, Trace, read_trace
from present.test_summary import SUMMARY

FLOOD = Refusal(client=4, reason="names", what="brings tensor 'a\x1b[31m" + "b" * 10**6 + "'", times=999)
SOME = Attendance.of((3, 4, 5), (3,), [FLOOD, Refusal(client=3, reason="twice", what="was counted already")])
ROUNDS = [
    Report(round=1, clients=(3, 4, 5), metrics={"skipped": 1.0}, attendance=SOME),
    Report(round=2, clients=(3, 4, 5), metrics={}, attendance=Attendance.of((3, 4, 5), (3, 4, 5), ())),
]


def test_a_trace_says_who_came_where_not_everybody_did(tmp_path: Path) -> None:
    trace = Trace(tmp_path)
    for report in ROUNDS:
        trace(Event(column="federated", report=report, total_rounds=2, grid=""))
    assert ["attendance" in line for line in (tmp_path / "trace.jsonl").read_text().splitlines()] == [True, False]
    first, second = (event.report.attendance for event in read_trace(tmp_path))
    assert first == SOME
    assert (first.refused, first.missing) == ({"names": 999, "twice": 1}, (5,))
    assert second.summary() == ""


def test_what_a_stranger_sent_is_cut_short_and_steers_no_terminal() -> None:
    assert len(SOME.named[0].what) < 500
    assert "\x1b" not in SOME.named[0].what
    line = attendance_text(Event(column="federated", report=ROUNDS[0], total_rounds=2, grid=""))
    assert "1 of 3 count; late 1 (client 5), not admitted 1 (client 4): client 4: brings tensor" in line
    assert attendance_text(Event(column="federated", report=ROUNDS[1], total_rounds=2, grid="")) == ""


def test_a_summary_adds_the_rounds_up_and_the_table_shows_it() -> None:
    told = {"invited": 6, "arrived": 4, "refused": {"names": 999, "twice": 1}, "missing": 1, "skipped": 1}
    told["causes"] = {"late": 1, "not admitted": 1}
    assert attendance_of(ROUNDS) == told
    assert attendance_of(ROUNDS[1:]) is None
    text = table_text(summary_table({**SUMMARY, "attendance": told}))
    assert "4 of 6 count; late 1, not admitted 1; refused: 999 names, 1 twice; missing: 1; rounds skipped: 1" in text
    assert "answers to the rounds" not in table_text(summary_table({**SUMMARY, "attendance": None}))
