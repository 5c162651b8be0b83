"""Prints what ``lichen init`` found, and what it left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lichen.core.visible import clipped, listed
from lichen.data.reading import reading_of
from lichen.data.sources.files import read_notes
from lichen.data.sources.record import Record
from lichen.present.reading import reading_lines
from lichen.recipes.init.facts import ColumnFacts
from lichen.recipes.init.names import Roles

__all__ = ["report_lines"]

MAX_LEFT_OUT = 20
MOST_FILES = 64


def report_lines(
    data: Path,
    roles: Roles,
    columns: Sequence[ColumnFacts],
    records: Sequence[Record],
    values: Mapping[str, Any],
    owners: Sequence[str],
) -> list[str]:
    """Lines for the screen.

    Args:
        data: The file or folder, as the user named it.
        roles: Which column plays which role.
        columns: All columns of the rows that were looked at.
        records: Those rows, empty ones among them.
        values: The recipe.
        owners: The clients, where files or folders are those.
    """
    count = {column.name: len(column.counts) for column in columns}
    full = [record for record in records if record.text or record.messages or record.features is not None]
    lines = [f"{data}: {len(records):,} rows looked at, {len(columns):,} columns"]
    lines += read_notes(data.expanduser(), most=MOST_FILES)
    lines.append(f"taken for: {roles.shape}; task {roles.task}")
    for role, some in roles.columns.items():
        names = (some,) if isinstance(some, str) else some
        number = f"  ({count[names[0]]:,} different)" if role in ("client", "label", "group") else ""
        lines.append(f"  {role:<10} {' + '.join(clipped(name, 60) for name in names)}{number}")
    if owners and "client" not in roles.columns:
        lines.append(f"  {'client':<10} {listed(owners, most=6)}")
    for name, why in islice(roles.left.items(), MAX_LEFT_OUT):
        lines.append(f"  left out   {clipped(name, 60)}: {why}")
    if len(roles.left) > MAX_LEFT_OUT:
        lines.append(f"  left out   {len(roles.left) - MAX_LEFT_OUT:,} more columns")
    if full:
        lines += reading_lines(reading_of(full).as_dict())
    if len(full) < len(records):
        what = "numbers" if "numbers" in roles.columns else "text"
        lines.append(f"  {len(records) - len(full):,} rows without {what} will be dropped")
    if "max_length" in values["data"]:
        lines.append(
            f"  length     {values['data']['max_length']} tokens a row (data.max_length, guessed from letters)"
        )
    return lines
