"""Records as columns: most rows of a large file are never looked at, since clients are chosen first, by one column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, final, overload

import numpy as np

from lichen.data.sources.record import Record

__all__ = ["Some", "Table", "column_of"]

_DEFAULTS = {field.name: field.default for field in fields(Record)}


@final
class Table(Sequence[Record]):
    """Records of which only the columns are held; a record is made when it is asked for.

    Args:
        columns: Equally long lists by name: client, text, prompt, label, messages, group, time, rejected and rating.
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
        names = tuple(self.columns)
        return (Record(**dict(zip(names, row, strict=True))) for row in zip(*self.columns.values(), strict=True))


@final
class Some(Sequence[Record]):
    """Some rows of many, made when they are looked at: those of clients that are not chosen never are.

    Args:
        records: All of them.
        numbers: Which, in what order.
    """

    __slots__ = ("numbers", "records")

    def __init__(self, records: Sequence[Record], numbers: np.ndarray) -> None:
        self.records: Sequence[Record] = records
        self.numbers = numbers
        if isinstance(records, Some):  # some of some are some of all
            self.records, self.numbers = records.records, records.numbers[numbers]

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
    if isinstance(records, Table):
        return records.columns[name] if name in records.columns else [_DEFAULTS[name]] * len(records)
    if isinstance(records, Some) and isinstance(records.records, Table):
        whole = records.records.columns.get(name)
        return [_DEFAULTS[name]] * len(records) if whole is None else [whole[i] for i in records.numbers.tolist()]
    return [getattr(record, name) for record in records]
