"""Prints a comparison: a table on screen, Markdown, CSV, JSON.

What is best in a column is marked, by what is shown: two that read alike are both best. A column where
no method has anything to say is left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from lichen.present.cells import text_cell
from lichen.present.compare import ComparisonRow, Spread
from lichen.present.table import new_table
from lichen.present.units import bytes_text, score_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_csv", "comparison_markdown", "comparison_table", "notes"]


def _spread_text(value: Spread | None) -> str:
    if value is None:
        return "-"
    return score_text(value.mean) + ("" if value.std is None else f" ± {value.std:.2g}")


def _forgotten_text(row: ComparisonRow) -> str:
    if row.forgotten_before is None or row.forgotten_after is None:
        return "-"
    return f"{score_text(row.forgotten_before.mean)} → {_spread_text(row.forgotten_after)}"


def _known(write: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else write(value)


def _reached_text(row: ComparisonRow, value: Spread | None, write: Callable[[float], str]) -> str:
    """What it took to reach the target, on average over the seeds that did; how many, where not all."""
    if row.target is None:
        return "-"
    if value is None:
        return "never"
    deviation = "" if value.std is None else f" ± {write(value.std)}"
    return f"{write(value.mean)}{deviation}" + ("" if row.reached == len(row.seeds) else f" ({_part_reached(row)})")


def _part_reached(row: ComparisonRow) -> str:
    return f"{row.reached} of {len(row.seeds)}"


def _constant_text(row: ComparisonRow) -> str:
    """What the constant answer scores, and on how many seeds the method is no better or worse than exactly that."""
    met = f" (= on {row.constant_seeds} of {len(row.seeds)})" if row.constant_seeds else ""
    return _spread_text(row.constant) + met


def _by_all(row: ComparisonRow, value: Spread | None) -> float | None:
    """The mean, where every seed reached the target: only then do means compare."""
    return None if value is None or row.reached < len(row.seeds) else value.mean


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """A column of the table: how a row is written there, and by what number rows are ranked."""

    name: str
    write: Callable[[ComparisonRow], str]
    rank: Callable[[ComparisonRow], float | None] = lambda _: None
    higher: bool = False


def _mean(value: Spread | None) -> float | None:
    return None if value is None else value.mean


def _heads(rows: Sequence[ComparisonRow]) -> list[_Head]:
    """The columns in which at least one row has something to say."""
    metric = next((row.metric for row in rows if row.metric), "score")
    higher = next((row.higher_is_better for row in rows if row.metric), True)
    constant = next((row.constant_name for row in rows if row.constant_name), "constant")
    heads = [
        _Head(name=metric, write=lambda r: _spread_text(r.value), rank=lambda r: _mean(r.value), higher=higher),
        _Head(name="worst decile", write=lambda r: _spread_text(r.worst), rank=lambda r: _mean(r.worst), higher=higher),
        _Head(name="base", write=lambda r: _spread_text(r.base)),
        _Head(name=constant, write=_constant_text),
        _Head(name="forgotten", write=_forgotten_text, rank=lambda r: _mean(r.forgotten_after)),
        _Head(
            name="attack success",
            write=lambda r: _spread_text(r.attack_success),
            rank=lambda r: _mean(r.attack_success),
        ),
        _Head(name="refused", write=lambda r: _spread_text(r.refused), rank=lambda r: _mean(r.refused), higher=True),
        _Head(
            name="time to target",
            write=lambda r: _reached_text(r, r.target_seconds, seconds_text),
            rank=lambda r: _by_all(r, r.target_seconds),
        ),
        _Head(
            name="rounds to target",
            write=lambda r: _reached_text(r, r.target_rounds, lambda n: f"{n:.3g}"),
            rank=lambda r: _by_all(r, r.target_rounds),
        ),
        _Head(
            name="bytes to target",
            write=lambda r: _reached_text(r, r.target_bytes, bytes_text),
            rank=lambda r: _by_all(r, r.target_bytes),
        ),
        _Head(name="up", write=lambda r: _known(bytes_text, r.client_up), rank=lambda r: r.client_up),
        _Head(name="down", write=lambda r: _known(bytes_text, r.client_down), rank=lambda r: r.client_down),
        _Head(name="total", write=lambda r: _known(bytes_text, r.total), rank=lambda r: r.total),
        _Head(name="client memory", write=lambda r: _known(bytes_text, r.memory), rank=lambda r: r.memory),
        _Head(name="FM asked", write=lambda r: _known(lambda n: f"{n:,.0f}", r.calls), rank=lambda r: r.calls),
        _Head(name="FM tokens", write=lambda r: _known(lambda n: f"{n:,.0f}", r.written), rank=lambda r: r.written),
        _Head(name="time", write=lambda r: _known(seconds_text, r.seconds), rank=lambda r: r.seconds),
        _Head(name="rounds", write=lambda r: _known(lambda n: f"{n:g}", r.rounds)),
        _Head(name="seeds", write=lambda r: f"{len(r.seeds)}" if len(r.seeds) == r.wanted else _part(r)),
        _Head(name="failed", write=lambda r: "; ".join(r.faults) or "-"),
    ]
    always = (metric, "seeds")
    return [head for head in heads if head.name in always or any(head.write(row) != "-" for row in rows)]


def _part(row: ComparisonRow) -> str:
    return f"{len(row.seeds)} of {row.wanted}"


def _best(head: _Head, rows: Sequence[ComparisonRow]) -> set[int]:
    """The rows to mark: the best by what is shown, unless all are."""
    ranked = {i: value for i, row in enumerate(rows) if (value := head.rank(row)) is not None}
    if len(ranked) < 2:
        return set()
    best = (max if head.higher else min)(ranked, key=lambda i: ranked[i])
    shown = head.write(rows[best])
    found = {i for i in ranked if ranked[i] == ranked[best] or head.write(rows[i]) == shown}
    return set() if len(found) == len(ranked) else found


def notes(rows: Sequence[ComparisonRow]) -> tuple[str, ...]:
    """What the columns mean, a sentence each; only for columns that are there."""
    heads = _heads(rows)
    metric = next((row.metric for row in rows if row.metric), "")
    higher = next((row.higher_is_better for row in rows if row.metric), True)
    lines = []
    if metric:
        way = "higher" if higher else "lower"
        lines.append(f"{metric}: {way} is better; mean over clients, ± sample standard deviation over seeds.")
    if any(row.constant is not None for row in rows):
        name = next(row.constant_name for row in rows if row.constant_name)
        lines.append(f"{name}: one answer for every row, the one that serves the training rows best.")
    constant = [f"{row.method} on {row.constant_seeds} of {len(row.seeds)} seeds" for row in rows if row.constant_seeds]
    if constant:
        lines.append(
            f"= on: every score is that of this constant answer, so nothing was learned: {', '.join(constant)}."
        )
    counted = ", validation counted in" if any(row.validation_counted for row in rows) else ", validation left out"
    targets = ", ".join(sorted({f"{row.target:g}" for row in rows if row.target is not None}))
    words = {"counted": counted, "targets": targets}
    return (*lines, *(_NOTES[head.name].format_map(words) for head in heads if head.name in _NOTES))


_NOTES = {
    "forgotten": "forgotten: perplexity on a text nobody trained on, before → after; lower is better.",
    "attack success": "attack success: share of rows with a back door's trigger that are given its class; lower is "
    "better.",
    "refused": "refused: share of unsafe requests that the kept model refuses, by phrases; higher is better.",
    "time to target": "to target: until validation first reached {targets}; mean ± deviation over the seeds that did, "
    "validation counted in; time is virtual where there is a clock.",
    "up": "up, down: bytes from and to one client for its training in one round{counted}.",
    "total": "total: bytes up and down of the whole federated run, validation included.",
    "client memory": "client memory: the frozen model and the most bytes of tensors alive while the client with the "
    "longest rows trains alone; interpreter and libraries left out.",
    "FM asked": "FM asked: texts given to a foundation model; FM tokens: what it wrote or scored, answers on disk left "
    "out.",
    "time": "time: of a whole run on this machine, all its columns and learning rates.",
}
"""What a column holds, by its name."""


def comparison_table(rows: Sequence[ComparisonRow]) -> Table:
    """The rows for a terminal, in their order; the best of a column is bold and has a star."""
    from rich.text import Text

    heads = _heads(rows)
    best = [_best(head, rows) for head in heads]
    numbers = [head.name for head in heads if head.name != "failed"]
    table = new_table(None, "method", *(head.name for head in heads), numbers=numbers)
    for i, row in enumerate(rows):
        cells = [
            Text(f"{head.write(row)} *", style="bold") if i in marked else Text(head.write(row))
            for head, marked in zip(heads, best, strict=True)
        ]
        table.add_row(Text(row.method), *cells)
    return table


def comparison_markdown(rows: Sequence[ComparisonRow], *, title: str = "", question: str = "") -> str:
    """The same as a page of Markdown, the best of a column bold."""
    heads = _heads(rows)
    best = [_best(head, rows) for head in heads]

    def plain(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"# {title}", ""] if title else []
    lines += [question, ""] if question else []
    lines += ["| method | " + " | ".join(head.name for head in heads) + " |"]
    lines += ["|---|" + "".join("---|" if head.name == "failed" else "---:|" for head in heads)]
    for i, row in enumerate(rows):
        cells = [
            f"**{plain(head.write(row))}**" if i in marked else plain(head.write(row))
            for head, marked in zip(heads, best, strict=True)
        ]
        lines.append(f"| {plain(row.method)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(rows))]) + "\n"


def comparison_csv(rows: Sequence[ComparisonRow]) -> str:
    """The same as numbers: a line a method, empty where nothing is known."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    reached = ("target_rounds", "target_bytes", "target_seconds")
    spreads = (
        "value",
        "worst",
        "base",
        "constant",
        "forgotten_before",
        "forgotten_after",
        "attack_success",
        "refused",
        *reached,
    )
    costs = ("client_up", "client_down", "train_up", "train_down", "total", "memory")
    plain = (*costs, "calls", "written", "seconds", "rounds", "target", "reached", "constant_seeds")
    writer.writerow(
        [
            "method",
            "metric",
            "seeds",
            *(f"{name}_{part}" for name in spreads for part in ("mean", "std")),
            *plain,
            "failed",
        ]
    )
    for row in rows:
        cells: list[Any] = [text_cell(row.method), text_cell(row.metric), " ".join(map(str, row.seeds))]
        for name in spreads:
            value: Spread | None = getattr(row, name)
            cells += ["", ""] if value is None else [value.mean, "" if value.std is None else value.std]
        cells += ["" if (number := getattr(row, name)) is None else number for name in plain]
        writer.writerow([*cells, text_cell("; ".join(row.faults))])
    return out.getvalue()
