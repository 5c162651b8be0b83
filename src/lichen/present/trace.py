"""Writes and reads the trace: one JSON line a round.

Each line is on disk before the next round starts, so a kill loses nothing that was reported. A torn
last line, left by a kill in the middle of a write, is no fault: its round will be repeated.

A line holds ``column, grid, round, total_rounds, clients, metrics, tokens, bytes_up, bytes_down,
seconds, valid_up, valid_down``; a metric that is not finite is null, because JSON has no NaN. Lines of older
runs lack the last two. Where not everybody came, or something was refused, ``attendance`` says so: of all who were
asked and do not count the clients by cause, no longer than the list of those asked, and the first refusals with their
sentences. Where clients were valued, ``value`` says what each contributed. Where a step is made after so many answers
and no seed says whose, ``order`` lists ``[client, version]`` as they came.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lichen.core import private
from lichen.core.errors import LichenError

if TYPE_CHECKING:
    from lichen.core.contracts.algorithm import Report
    from lichen.core.replies import Attendance

__all__ = [
    "Event",
    "Trace",
    "came_to_nothing",
    "event_line",
    "event_of",
    "failed_rates",
    "lr_name",
    "read_trace",
]

NAME = "trace.jsonl"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A round's report and what it belongs to; observers get these and cannot steer.

    Attributes:
        column: Which way of learning, such as ``federated``.
        report: The round.
        total_rounds: How many rounds this column and grid point will have.
        grid: The point of the grid, such as ``lr=0.001``; empty where there is none.
    """

    column: str
    report: Report
    total_rounds: int
    grid: str


def lr_name(lr: float) -> str:
    """How a learning rate is called in folders, traces and works; unequal rates have unequal names.

    >>> lr_name(0.005), lr_name(1e-5), lr_name(0.1000000001)
    ('lr=0.005', 'lr=1e-05', 'lr=0.1000000001')
    """
    short = f"{lr:g}"
    return f"lr={short if float(short) == lr else repr(float(lr))}"


def came_to_nothing(report: Report) -> bool:
    """Whether a round in which clients were invited trained on no row that counts."""
    return bool(report.clients) and (report.tokens == 0 or "skipped" in report.metrics)


def failed_rates(events: Iterable[Event]) -> dict[str, tuple[list[str], list[str]]]:
    """By column, the learning rates at which no round came to anything, and all others.

    Where one failed, what it is judged by is the model as it was at the start.
    """
    nothing: dict[tuple[str, str], bool] = {}
    for event in events:
        key = event.column, event.grid
        nothing[key] = nothing.get(key, True) and came_to_nothing(event.report)
    found: dict[str, tuple[list[str], list[str]]] = {}
    for (column, grid), failed in nothing.items():
        found.setdefault(column, ([], []))[0 if failed else 1].append(grid.removeprefix("lr="))
    return found


def event_line(event: Event) -> bytes:
    """One line of JSON, with its line end."""
    report = event.report
    record = {
        "column": event.column,
        "grid": event.grid,
        "round": report.round,
        "total_rounds": event.total_rounds,
        "clients": list(report.clients),
        "metrics": {k: float(v) if math.isfinite(v) else None for k, v in sorted(report.metrics.items())},
        "tokens": report.tokens,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "seconds": float(report.seconds),
        "valid_up": report.valid_up,
        "valid_down": report.valid_down,
    }
    if report.attendance.summary():
        # What counted stands in the record of the run.
        attendance = asdict(replace(report.attendance, receipts=(), order=()))
        record["attendance"] = {n: value for n, value in attendance.items() if n not in ("receipts", "order")}
    if report.attendance.order:
        record["order"] = [list(one) for one in report.attendance.order]
    if report.value is not None:
        record["value"] = report.value.dump()
    return json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _attendance(record: Mapping[str, Any] | None) -> Attendance:
    """Who came, as a line of the trace says; nothing is said where everybody did."""
    from lichen.core.replies import ATTENDED, Attendance, Refusal

    if record is None:
        return ATTENDED
    return Attendance(
        invited=int(record["invited"]),
        arrived=int(record["arrived"]),
        refused={str(reason): int(count) for reason, count in record["refused"].items()},
        named=tuple(Refusal(**refusal) for refusal in record["named"]),
        missing=tuple(int(client) for client in record["missing"]),
        causes={
            str(cause): tuple(int(client) for client in clients) for cause, clients in record.get("causes", {}).items()
        },
    )


def event_of(line: bytes) -> Event:
    """Undo :func:`event_line`; what is damaged raises as JSON, dicts and numbers do."""
    from lichen.core.contracts.algorithm import Report
    from lichen.core.contracts.value import RoundValue

    record: dict[str, Any] = json.loads(line)
    report = Report(
        round=int(record["round"]),
        clients=tuple(int(client) for client in record["clients"]),
        metrics={str(k): math.nan if v is None else float(v) for k, v in record["metrics"].items()},
        tokens=None if record["tokens"] is None else int(record["tokens"]),
        bytes_up=int(record["bytes_up"]),
        bytes_down=int(record["bytes_down"]),
        seconds=float(record["seconds"]),
        valid_up=int(record.get("valid_up", 0)),
        valid_down=int(record.get("valid_down", 0)),
        attendance=replace(
            _attendance(record.get("attendance")),
            order=tuple((int(client), int(version)) for client, version in record.get("order", ())),
        ),
        value=RoundValue.load(record["value"]) if "value" in record else None,
    )
    return Event(
        column=str(record["column"]), report=report, total_rounds=int(record["total_rounds"]), grid=str(record["grid"])
    )


def _whole(data: bytes) -> bytes:
    """The data without a torn last line."""
    return data[: data.rfind(b"\n") + 1]


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """An observer that appends each event to ``trace.jsonl`` in a run's folder.

    Args:
        folder: The run's folder; made when first needed.
    """

    folder: Path

    def __call__(self, event: Event) -> None:
        """Append one line and force it to disk."""
        private.make_folders(self.folder)
        if not (self.folder / NAME).exists():
            os.close(private.create(self.folder / NAME))
        with open(self.folder / NAME, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(len(_whole(file.read())))
            file.write(event_line(event))
            file.flush()
            os.fsync(file.fileno())


def read_trace(folder: Path) -> tuple[Event, ...]:
    """The events of a run in the order they happened; none where nothing was traced yet.

    Raises:
        LichenError: if a line other than a torn last one cannot be read.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return ()
    events = []
    for number, line in enumerate(_whole(path.read_bytes()).splitlines(), start=1):
        try:
            events.append(event_of(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LichenError(
                "is not a line of a trace", where=f"{path}, line {number}", fix="remove the line, or run again"
            ) from None
    return tuple(events)
