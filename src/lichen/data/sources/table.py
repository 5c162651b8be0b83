"""Records as columns: a large file is parsed once and read back from the cache.

Parsing JSON costs many times what reading its strings back does, and most rows of a large file are
never looked at: clients are chosen first, by one column. This is for public data only: private rows are
parsed anew, because a second copy of them in the clear is not worth the seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final, overload

import numpy as np
import torch

from lichen.core.tree import Tree
from lichen.data.sources.cache import keep, key_of
from lichen.data.sources.record import Record

__all__ = ["MIN_BYTES", "Some", "Table", "cached_records", "column_of"]

MIN_BYTES = 1 << 20
"""Smaller sources are parsed as quickly as they are found."""

_CODE = (
    "sources/table",
    "sources/records",
    "sources/readers",
    "sources/files",
    "formats/encodings",
    "formats/delimited",
    "formats/json_rows",
    "formats/parquet_rows",
    "formats/cells",
    "chat/turns",
    "chat/messages",
)
"""What decides what is read, so that an edited file never finds what the old one left."""

_SEPARATOR = "\x1e"
_PLAIN = ("client", "text", "prompt", "group")
_JSON = ("label", "messages")


@final
class Table(Sequence[Record]):
    """Records of which only the columns are held; a record is made when it is asked for.

    Args:
        columns: Equally long lists by name: client, text, prompt, label, messages and group.
    """

    __slots__ = ("columns",)

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["client"])

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> Table: ...
    def __getitem__(self, row: int | slice) -> Record | Table:
        if isinstance(row, slice):
            return Table({name: column[row] for name, column in self.columns.items()})
        return Record(**{name: column[row] for name, column in self.columns.items()})

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))


@final
class Some(Sequence[Record]):
    """Some rows of many, made when they are looked at: those of clients that are not chosen never are.

    Args:
        records: All of them.
        numbers: Which, in what order.
    """

    __slots__ = ("numbers", "records")

    def __init__(self, records: Sequence[Record], numbers: np.ndarray) -> None:
        self.records, self.numbers = records, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | Sequence[Record]:
        if isinstance(row, slice):
            return Some(self.records, self.numbers[row])
        return self.records[int(self.numbers[row])]

    def __iter__(self) -> Iterator[Record]:
        return (self.records[i] for i in self.numbers.tolist())


def column_of(records: Sequence[Record], name: str) -> Sequence[Any]:
    """One attribute of every record, without making the records of a table.

    >>> column_of([Record(client="a", label=1), Record(client="b")], "label")
    [1, None]
    """
    if isinstance(records, Table) and name in records.columns:
        return records.columns[name]
    if isinstance(records, Some):
        whole = column_of(records.records, name)
        return [whole[i] for i in records.numbers.tolist()]
    return [getattr(record, name) for record in records]


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
