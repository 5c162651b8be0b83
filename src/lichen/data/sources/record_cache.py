"""Keeps the records of a public file as columns in the cache, so that it is parsed once.

Parsing JSON costs many times what reading its strings back does. This is for public data only: private rows are parsed
anew, because a second copy of them in the clear is not worth the seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lichen.core.tree import Tree
from lichen.data.sources.cache import keep, key_of
from lichen.data.sources.record import Record
from lichen.data.sources.table import Table, column_of

__all__ = ["cached_records"]

MIN_BYTES = 1 << 20
"""Smaller sources are parsed as quickly as they are found."""

_CODE = (
    "sources/record_cache",
    "sources/table",
    "sources/records",
    "sources/readers",
    "sources/changelogs",
    "sources/files",
    "formats/encodings",
    "formats/delimited",
    "formats/json_rows",
    "formats/parquet_rows",
    "formats/cells",
    "formats/numbers",
    "chat/turns",
    "chat/messages",
    "chat/preference_rows",
)
"""What decides what is read, so that an edited file never finds what the old one left."""

_SEPARATOR = "\x1e"
_PLAIN = ("client", "text", "prompt", "group", "time", "rejected")
_JSON = ("label", "messages", "rating")


def cached_records(
    source: Path,
    make: Callable[[], Sequence[Record]],
    *how: object,
    folder: Path,
    files: Sequence[Path] | None = None,
) -> Sequence[Record]:
    """The records of a public file or folder, parsed once.

    Args:
        source: What is read; its bytes are part of what finds the kept table.
        make: Parses it.
        how: Whatever else decides what comes out, such as the columns.
        folder: Where kept tables lie.
        files: Which files of a folder are read; all of them if None.
    """
    if files is None:
        files = sorted(f for f in source.rglob("*") if f.is_file()) if source.is_dir() else [source]
    if sum(f.stat().st_size for f in files) < MIN_BYTES:
        return make()
    hashes = [(os.path.relpath(f, source.parent), _sha256(f)) for f in files]
    here = Path(__file__).parents[1]
    code = tuple(str(here / f"{name}.py") for name in _CODE)
    return keep(key_of("records", hashes, how, code=code), make, write=_write, read=_read, folder=folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(records: Sequence[Record]) -> Tree | None:
    if any(record.features is not None or record.held_out for record in records):
        return None
    columns = {name: list(column_of(records, name)) for name in _PLAIN}
    columns |= {name: [json.dumps(value, default=dict) for value in column_of(records, name)] for name in _JSON}
    tree: Tree = {}
    for name, column in columns.items():
        joined = _SEPARATOR.join(column)
        if joined.count(_SEPARATOR) != len(column) - 1:
            return None  # somebody's text holds the separator
        tree[name] = torch.frombuffer(bytearray(joined.encode("utf-8", "surrogatepass") + b"\n"), dtype=torch.uint8)
    return tree


def _read(tree: Tree) -> Table:
    columns: dict[str, list[Any]] = {}
    for name in (*_PLAIN, *_JSON):
        columns[name] = tree[name].numpy().tobytes()[:-1].decode("utf-8", "surrogatepass").split(_SEPARATOR)
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError("columns of unequal length")
    for name in _JSON:  # few of them differ: a label's classes, or no messages at all
        value = {text: _thawed(json.loads(text)) for text in set(columns[name])}
        columns[name] = [value[text] for text in columns[name]]
    return Table(columns)


def _thawed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
