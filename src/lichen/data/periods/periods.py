"""Cuts rows into periods: months, years, several of them, or so many rows after one another.

Where a period begins depends on ``by`` alone, never on the rows: periods of twenty years begin in years that twenty
divides. So rows that come later make new periods and leave the earlier ones as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import final

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.periods.lengths import Length
from lichen.data.periods.moments import Moment, moments_of

__all__ = ["MAX_PERIODS", "Period", "cut"]

MAX_PERIODS = 1000
"""Of more, a unit was meant in another way than it is read."""


@final
@dataclass(frozen=True, slots=True)
class Period:
    """Rows of one period.

    Attributes:
        name: As it is told and as its folder is called, such as ``2018-05``, ``1800-1819`` or ``rows-00001-00500``.
        rows: Which rows, in the order in which they were read.
    """

    name: str
    rows: np.ndarray


def cut(times: Sequence[str], length: Length) -> tuple[list[Period], int]:
    """The periods that have rows, the earliest first, and how many rows wait for a period that is not full yet.

    Args:
        times: When each row was written. By rows, they may all be empty: rows then come as they were read.
        length: How long a period is.

    Raises:
        LichenError: for a row without a date that can be read, a number where months or days are asked for, or too many
            periods.
    """
    if length.unit == "row":
        order = np.arange(len(times))
        if any(time.strip() for time in times):
            moments = moments_of(times)
            order = np.array(sorted(range(len(times)), key=lambda row: (moments[row], row)), dtype=np.int64)
        whole = len(times) // length.count
        _refuse_many(whole)
        starts = [number * length.count for number in range(whole)]
        names = [f"rows-{start + 1:07d}-{start + length.count:07d}" for start in starts]
        some = [np.sort(order[start : start + length.count]) for start in starts]
        return [Period(name, rows) for name, rows in zip(names, some, strict=True)], len(times) - whole * length.count
    rows_of: dict[int, list[int]] = {}
    for row, moment in enumerate(moments_of(times)):
        rows_of.setdefault(_number(moment, length, row, times[row]), []).append(row)
    _refuse_many(len(rows_of))
    return [Period(_name(number, length), np.array(rows_of[number], dtype=np.int64)) for number in sorted(rows_of)], 0


def _refuse_many(count: int) -> None:
    if count > MAX_PERIODS:
        raise LichenError(
            f"makes {count:,} periods, and {MAX_PERIODS:,} at most are trained one after the other",
            where="stream.by",
            fix="use longer ones, such as 20 years or 500 rows",
        )


def _number(moment: Moment, length: Length, row: int, text: str) -> int:
    """Which period a moment is in, counted from a beginning that all data share."""
    if length.unit == "year":
        return moment.year // length.count
    if not moment.month or (length.unit == "day" and not moment.day):
        raise LichenError(
            f"row {row + 1} has {text!r}, which names no {length.unit}",
            where="data.columns.time",
            fix="write whole dates such as 2018-05-03, or use longer periods in stream.by, such as year or 500 rows",
        )
    if length.unit == "month":
        return (12 * moment.year + moment.month - 1) // length.count
    return date(moment.year, moment.month, moment.day).toordinal() // length.count


def _name(number: int, length: Length) -> str:
    first, last = number * length.count, (number + 1) * length.count - 1
    if length.unit == "year":
        return f"{first:04d}" if first == last else f"{first:04d}-{last:04d}"
    if length.unit == "month":
        one, other = (f"{month // 12:04d}-{month % 12 + 1:02d}" for month in (first, last))
    else:
        one, other = (date.fromordinal(min(max(day, 1), date.max.toordinal())).isoformat() for day in (first, last))
    return one if first == last else f"{one}-to-{other}"
