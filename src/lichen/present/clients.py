"""Writes and reads ``clients.csv``: every client's results.

Names stand there in full, whatever a picture has room for; as cells that no spreadsheet runs
(:mod:`lichen.present.cells`). A number that is not known is an empty cell.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST, check
from lichen.present.cells import read_cell, text_cell
from lichen.present.column_names import column_title
from lichen.present.gains import harmed_below
from lichen.present.summary import COLUMNS, stronger_alone
from lichen.present.table import new_table
from lichen.present.units import score_text

if TYPE_CHECKING:
    from rich.table import Table

    from lichen.core.contracts.algorithm import Report

__all__ = ["client_rows", "clients_csv", "clients_table", "read_clients"]

NAME = "clients.csv"

COUNTS = ("train", "valid", "test", "cut")
"""Rows of a client by part, and how many of them ``data.max_length`` cuts."""

INVITED = ("invited", "counted")
"""How often a client was asked to train, and how often its answer counted, where anybody's did not."""

WORDS = ("client", "harmed", "why not")
"""What is no number."""


def client_rows(
    names: Sequence[str],
    counts: Sequence[Mapping[str, int | None]],
    scores: Mapping[str, Sequence[float]],
    *,
    higher_is_better: bool,
    rounds: Sequence[Report] = (),
    missing: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
) -> list[dict[str, Any]]:
    """A mapping for each client: ``client``, its rows, its score in every column, ``gain`` and ``harmed``.

    ``harmed`` names what its federated score is worse than: ``base``, ``alone`` or ``alone_best``.

    Args:
        names: The clients.
        counts: Their rows by part; none at all where they are not known.
        scores: By column, one a client.
        higher_is_better: What a gain is: how much better ``federated`` is than ``alone``, positive if it is; than
            ``alone_best`` where that is better on average.
        rounds: Of the federated column: where somebody did not count, each client has how often it was ``invited`` to
            train and ``counted``, and ``why not``, by cause.
        missing: By column, the clients that gave no score in time, by cause: they stand in ``why not``, too.
    """
    came = _attended(rounds, missing or {})
    columns = [*COLUMNS, *(name for name in scores if name not in COLUMNS)]
    sign = 1.0 if higher_is_better else -1.0
    against = stronger_alone(scores, higher_is_better) or "alone"
    rows = []
    for place, name in enumerate(names):
        mine = {column: finite_or_none(scores[column][place]) if column in scores else None for column in columns}
        alone, joined = mine[against], mine["federated"]
        known = counts[place] if counts else {}
        rows.append(
            {
                "client": name,
                **{part: known.get(part) for part in COUNTS},
                **mine,
                "gain": None if alone is None or joined is None else sign * (joined - alone),
                "harmed": harmed_below(mine, higher_is_better=higher_is_better) or None,
                **({} if came is None else came(place)),
            }
        )
    return rows


def _attended(
    rounds: Sequence[Report], missing: Mapping[str, Mapping[str, Sequence[int]]]
) -> Callable[[int], dict[str, Any]] | None:
    """How often a client came to rounds, and why not; None where everybody did."""
    invited, away = Counter[int](), Counter[int]()
    causes: dict[int, Counter[str]] = {}
    for report in rounds:
        invited.update(report.clients)
        away.update(report.attendance.uncounted)
        for cause, clients in report.attendance.causes.items():
            for client in clients:
                causes.setdefault(client, Counter())[cause] += 1
    for column, found in missing.items():
        for cause, some in found.items():
            for client in some:
                causes.setdefault(client, Counter())[f"score of {column}: {cause}"] += 1
    if not causes:
        return None

    def of(client: int) -> dict[str, Any]:
        why = ", ".join(f"{cause} {count}" for cause, count in causes.get(client, {}).items())
        return {"invited": invited[client], "counted": max(invited[client] - away[client], 0), "why not": why or None}

    return of


def finite_or_none(value: float | None) -> float | None:
    """A number as JSON can hold it: None where it is missing, infinite or no number."""
    return float(value) if value is not None and math.isfinite(value) else None


def clients_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV, a line a client."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    heads = list(rows[0]) if rows else ["client"]
    writer.writerow([text_cell(head) for head in heads])
    for row in rows:
        cells = [row[head] for head in heads]
        writer.writerow(["" if cell is None else text_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return out.getvalue()


def read_clients(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished run's ``clients.csv``, names as they are in the data.

    Raises:
        LichenError: if there is none, or it is damaged.
    """
    path = Path(folder) / NAME
    try:
        text = path.read_text(encoding="utf-8")
        check(path.parent, MANIFEST, (NAME,), fix=f"write it anew: lichen run --resume {folder}")
        heads, *lines = csv.reader(io.StringIO(text, newline=""))
        return [_row([read_cell(head) for head in heads], cells) for cells in lines]
    except FileNotFoundError:
        raise LichenError(
            "holds no results by client: it is not finished, or was made by an older version",
            where=str(folder),
            fix=f"write them with: lichen run --resume {folder}",
        ) from None
    except (OSError, ValueError, csv.Error):
        raise LichenError("is damaged", where=str(path), fix=f"write it anew: lichen run --resume {folder}") from None


def _row(heads: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for head, cell in zip(heads, cells, strict=True):
        if head == "client":
            row[head] = read_cell(cell)
        elif not cell:
            row[head] = None
        elif head in WORDS:
            row[head] = read_cell(cell)
        else:
            row[head] = int(cell) if head in (*COUNTS, *INVITED) else float(cell)
    return row


def clients_table(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Table:
    """A line a client, in full names, the largest loss first and the largest gain last; columns not run left out.

    Args:
        rows: As :func:`client_rows` gives them.
        summary: The run's, for its name and metric.
    """
    from rich.text import Text

    heads = [head for head in (rows[0] if rows else {}) if any(row[head] is not None for row in rows)]
    better = "higher" if summary["higher_is_better"] else "lower"
    title = f"{summary['name']}: {summary['metric']} of each client ({better} is better)"
    titles = [column_title(head) for head in heads]
    table = new_table(title, *titles, numbers=[t for t, head in zip(titles, heads, strict=True) if head not in WORDS])
    order = sorted(rows, key=lambda row: (row["gain"] is not None, row["gain"] or 0.0, row["client"]))
    for row in order:
        cells = [
            "" if row[h] is None else str(row[h]) if h in (*COUNTS, *INVITED, *WORDS) else score_text(row[h])
            for h in heads
        ]
        table.add_row(*map(Text, cells))
    return table
