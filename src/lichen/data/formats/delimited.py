"""Reads CSV and other delimited files, and finds their delimiter.

The delimiter is the one under which the first rows are as wide as the line of names; nothing is guessed
from single letters.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.data.formats.encodings import MOST_LETTERS, lines_of, open_text

__all__ = ["delimited_rows", "form_of"]

_HEAD_LETTERS = 1 << 18
_HEAD_ROWS = 200
_NONE = "\x1f"
"""Parts no cells: every line is one."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Delimited:
    """How a table is written.

    Attributes:
        delimiter: What parts the cells.
        quoted: Whether quotes hold cells together.
        spaced: Whether a blank follows every delimiter.
    """

    delimiter: str
    quoted: bool = True
    spaced: bool = False

    def reader(self, lines: Iterable[str], *, strict: bool) -> Any:
        """Cells of each row."""
        quoting: Any = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        if csv.field_size_limit() < MOST_LETTERS:
            csv.field_size_limit(MOST_LETTERS)
        return csv.reader(lines, delimiter=self.delimiter, quoting=quoting, skipinitialspace=self.spaced, strict=strict)

    @property
    def words(self) -> str:
        """What a reader is told; empty for an ordinary table."""
        name = {";": "';'", "\t": "tabs", "|": "'|'"}.get(self.delimiter)
        if self.delimiter == _NONE:
            return "one column, commas belong to the text"
        parts = ([f"cells parted by {name}"] if name else []) + ([] if self.quoted else ["quotes are plain letters"])
        return ", ".join(parts)


def form_of(path: Path) -> Delimited:
    """How the table in a file is written, from its first rows.

    Raises:
        LichenError: if it is no text.
    """
    with open_text(path) as file:
        head = file.read(_HEAD_LETTERS)
        cut = bool(file.read(1))
    tabs = path.name.lower().removesuffix(".gz").endswith((".tsv", ".tab"))
    plain = Delimited(delimiter="\t" if tabs else ",")
    order = ("\t", ",", ";", "|") if tabs else (",", ";", "\t", "|")
    known = [Delimited(delimiter=delimiter) for delimiter in order]
    # Tables parted by tabs or bars often mean no quotes by their quotes.
    known += [Delimited(delimiter=delimiter, quoted=False) for delimiter in ("\t", "|")]
    fits = {form: _fit(form, head, cut) for form in known}
    best = max(known, key=lambda form: fits[form])
    if fits[best] == (0.0, 0):
        ragged = any(len(row) != 1 for row in _rows(plain, head, cut)[0])
        return Delimited(delimiter=_NONE) if ragged else plain
    first = _rows(best, head, cut)[0][0]
    spaced = all(name.startswith(" ") for name in first[1:])
    return Delimited(delimiter=best.delimiter, quoted=best.quoted, spaced=spaced)


def _fit(form: Delimited, head: str, cut: bool) -> tuple[float, int]:
    """The share of rows as wide as the line of names, half of it where quotes do not close, and that width."""
    rows, sound = _rows(form, head, cut)
    width = len(rows[0]) if rows else 0
    if width < 2:
        return 0.0, 0
    return sum(len(row) == width for row in rows) / len(rows) / (1 if sound else 2), width


def _rows(form: Delimited, head: str, cut: bool) -> tuple[list[list[str]], bool]:
    """The first rows, without blank lines and without one that is cut off; and whether their quotes are sound."""
    found = islice(form.reader(io.StringIO(head, newline=""), strict=False), _HEAD_ROWS)
    rows = [row for row in found if row]
    try:
        for _ in islice(form.reader(io.StringIO(head, newline=""), strict=True), _HEAD_ROWS):
            pass
        sound = True
    except csv.Error as error:
        sound = cut and "unexpected end" in str(error)
    return rows[:-1] if cut and len(rows) > 1 else rows, sound


def delimited_rows(path: Path) -> Iterator[Mapping[str, str]]:
    """The rows of a table, by the names in its first line.

    Raises:
        LichenError: naming the line that is not as wide as the first, or the name that stands twice.
    """
    form = form_of(path)
    with open_text(path) as file:
        reader = form.reader(lines_of(file, str(path)), strict=True)
        names: list[str] = []
        begin = 1
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise _broken(str(error), f"{path}, line {begin}") from None
            if not cells:
                continue
            if not names:
                names = _names(cells, path)
                continue
            if len(cells) > len(names) and not any(cells[len(names) :]):
                cells = cells[: len(names)]
            if len(cells) != len(names):
                raise LichenError(
                    f"is not valid CSV: {len(cells)} cells where the first line has {len(names)} columns",
                    where=f"{path}, line {begin}",
                    fix="quote cells that hold the delimiter, quotes or line breaks, or use .jsonl",
                )
            yield dict(zip(names, cells, strict=True))


def _names(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    while len(names) > 1 and not names[-1]:
        names.pop()  # a delimiter at the end of every line
    names = [name or f"column {number}" for number, name in enumerate(names, start=1)]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise LichenError(
            f"has two columns named {clipped(twice, 60)!r}",
            where=f"{path}, line 1",
            fix="give every column a name of its own",
        )
    return names


def _broken(why: str, where: str) -> LichenError:
    if "field larger" in why:
        return LichenError(
            f"holds a cell of more than {MOST_LETTERS >> 20} million letters",
            where=where,
            fix="close the quote that was opened there, or cut the cell",
        )
    if "unexpected end" in why:
        return LichenError("is not valid CSV: a quote is never closed", where=where, fix="close it, or use .jsonl")
    return LichenError(
        f"is not valid CSV: {why}", where=where, fix="write a quote inside a quoted cell twice, or use .jsonl"
    )
