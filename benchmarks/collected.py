"""What pages share whose tables come from collected runs of a comparison: their command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_tables"]


def run_tables(
    words: Sequence[str],
    what: str | None,
    *,
    collect: Callable[[str, Path], None],
    tables: Mapping[str, Callable[..., None]],
) -> None:
    """Do what the words of a command say: ``--collect NAME FOLDER``, or ``TABLE NAME``.

    Args:
        words: After the script's name.
        what: The script's documentation, whose first line is shown by ``--help``.
        collect: Keeps the numbers of a comparison's folder.
        tables: What prints each table, or else is done by a word.
    """
    reads: Any = argparse.ArgumentParser(description=(what or "").partition("\n")[0])
    reads.add_argument("--collect", nargs=2, metavar=("NAME", "FOLDER"))
    reads.add_argument("table", nargs="*", metavar=f"{{{','.join(tables)}}} NAME")
    given = reads.parse_args(words)
    if given.table and given.table[0] not in tables:
        reads.error(f"there is no table {given.table[0]!r}; use one of: {', '.join(tables)}")
    if given.collect:
        collect(given.collect[0], Path(given.collect[1]))
    if given.table:
        tables[given.table[0]](*given.table[1:])
