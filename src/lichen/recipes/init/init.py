"""Guesses a first recipe from the user's rows.

Rows are read as a run reads them, the first ten thousand of a large file. Guesses go by what columns are called and
by what they hold; each is written as a plain key that the user can change, and told with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.data.sources.files import data_files, file_rows, owners_of_files
from lichen.data.sources.records import records_of
from lichen.recipes.init.facts import ColumnFacts, columns_of
from lichen.recipes.init.names import Ask, Wishes
from lichen.recipes.init.report import report_lines
from lichen.recipes.init.shapes import roles_of
from lichen.recipes.init.values import values_of
from lichen.recipes.init.write import full_recipe, short_recipe

__all__ = ["columns_in", "guess", "init_recipe"]

HEAD_ROWS = 10_000
HEAD_LETTERS = 1 << 25
HEAD_FILES = 64


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What was found in the data.

    Attributes:
        values: The recipe, as a mapping.
        lines: Lines for the screen: what was taken for what, and what was left out.
        notes: Sentences that stand above the recipe.
    """

    values: Mapping[str, Any]
    lines: Sequence[str]
    notes: Sequence[str]

    def recipe(self, *, full: bool = False) -> str:
        """YAML for :func:`lichen.recipes.schema.read.read_recipe`: what matters, or every key with its meaning."""
        return full_recipe(self.values, list(self.notes)) if full else short_recipe(self.values, list(self.notes))


def init_recipe(data: Path, *, wishes: Wishes | None = None, full: bool = False) -> str:
    """Look at the user's data and write a recipe for it.

    Args:
        data: A CSV, JSONL, JSON or Parquet file, or a folder of such files.
        wishes: What the user said about columns, task and model.
        full: Write every key with its meaning.

    Returns:
        YAML that :func:`lichen.recipes.schema.read.read_recipe` accepts.

    Raises:
        LichenError: if there is no such file, it cannot be read, or holds no text.
    """
    return guess(data, wishes).recipe(full=full)


def guess(data: Path, wishes: Wishes | None = None, *, ask: Ask | None = None) -> Guess:
    """What the data are taken for.

    Args:
        data: A CSV, JSONL, JSON or Parquet file, or a folder of such files.
        wishes: What the user said about columns, task and model.
        ask: Asks a person where several answers are as good; None where there is nobody.

    Raises:
        LichenError: if there is no such file, it cannot be read, holds no text, or a wish does not fit it.
    """
    data, wishes = Path(data), wishes or Wishes()
    heads = _heads(data)
    owners = owners_of_files(data.expanduser(), data_files(data.expanduser()))
    by_file = len(set(owners.values())) > 1
    columns = columns_of([row for _, of in heads for row in of])
    roles = roles_of(columns, wishes, where=str(data), by_file=by_file and wishes.client is None, ask=ask)
    client = {file: owners[file] for file, _ in heads} if wishes.client is None else {}
    records = [
        record
        for file, of in heads
        for record in records_of(of, roles.columns, client=client.get(file, ""), where=str(file))
    ]
    texts = [record for record in records if record.text or record.messages or record.features is not None]
    if not texts:
        raise LichenError("has no row with text", where=str(data), fix="name another column by --text")
    values, notes = values_of(data, roles, wishes, texts, by_file)
    lines = report_lines(data, roles, columns, records, values, sorted(set(owners.values())) if by_file else ())
    return Guess(values=values, lines=[*lines, *notes], notes=[f"Written by lichen init. {notes[0]}", *_MORE])


_MORE = ("Every key with its meaning: lichen init DATA --full, and docs/guide.md.",)


def columns_in(data: Path) -> list[ColumnFacts]:
    """What the columns of the first rows hold, whatever a recipe makes of them.

    Args:
        data: A CSV, JSONL, JSON or Parquet file, or a folder of such files.

    Raises:
        LichenError: if there is no such file, it cannot be read, or has no row with anything in it.
    """
    columns = columns_of([row for _, of in _heads(data) for row in of])
    if not any(column.filled for column in columns):
        raise LichenError("has nothing in any column", where=str(data), fix="give the file that has the rows")
    return columns


def _heads(data: Path) -> list[tuple[Path, list[Mapping[str, Any]]]]:
    """The first rows of the first files, as many of each; there is one at least."""
    path = data.expanduser()
    if not path.exists():
        raise LichenError("no such file or folder", where=str(data), fix="check the path")
    some = data_files(path)[:HEAD_FILES]
    each = max(HEAD_ROWS // len(some), 200)
    found = []
    for file in some:
        rows, letters = [], 0
        for row in islice(file_rows(file), each):
            rows.append(row)
            letters += sum(len(cell) for cell in row.values() if isinstance(cell, str))
            if letters > HEAD_LETTERS // len(some):
                break
        found.append((file, rows))
    if not any(rows for _, rows in found):
        raise LichenError("has no rows", where=str(some[0]), fix="give data with at least a few rows below the names")
    return found
