"""Reads when a row was written: an ISO date or time, a year, or any number.

>>> moment_of("2018-05-03T01:38:01Z").year, moment_of("1790").year, moment_of("1790-01").month
(2018, 1790, 1)
>>> moment_of("2018") < moment_of("2018-05") < moment_of("2018-05-03") < moment_of("2018-05-03 00:00:01+00:00")
True
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple, final

from lichen.core.errors import LichenError
from lichen.core.visible import clipped

__all__ = ["Moment", "moment_of", "moments_of"]

_MONTH = re.compile(r"(\d{4})-(\d{1,2})")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WHERE = "data.columns.time"


@final
class Moment(NamedTuple):
    """When a row was written, in universal time; earlier ones compare as less.

    Attributes:
        year: Its year; of a number that is no date the number, rounded down.
        month: 1 to 12; 0 where only a year or a number is known.
        day: 1 to 31; 0 where it is not known.
        rest: Seconds of the day; of a number what is left of it.
    """

    year: int
    month: int = 0
    day: int = 0
    rest: float = 0.0


def moment_of(text: str) -> Moment | None:
    """The moment that a text names; None if it names none.

    Args:
        text: A date as ``2018-05-03``, with a time and an offset or without, ``2018-05``, a year, or any number. A time
            without an offset is taken for universal time.
    """
    text = text.strip()
    if _NUMBER.fullmatch(text) and not _compact(text):
        number = float(text)
        if not math.isfinite(number) or abs(number) >= 2**53:
            return None
        return Moment(math.floor(number), rest=number - math.floor(number))
    if month := _MONTH.fullmatch(text):
        year, number_of = int(month[1]), int(month[2])
        return Moment(year, number_of) if year and 1 <= number_of <= 12 else None
    try:
        found = datetime.fromisoformat(text)
        found = found if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    seconds = 3600 * found.hour + 60 * found.minute + found.second + found.microsecond / 1e6
    return Moment(found.year, found.month, found.day, seconds)


def moments_of(texts: Sequence[str]) -> list[Moment]:
    """The moment of each row.

    Args:
        texts: What each row says, in the order in which rows were read.

    Raises:
        LichenError: naming the first row that says nothing, or nothing that can be read.
    """
    known: dict[str, Moment | None] = {}
    found = list[Moment]()
    for row, text in enumerate(texts, start=1):
        if not text.strip():
            missing = sum(not one.strip() for one in texts)
            every = missing == len(texts)
            raise LichenError(
                "no row says when it was written"
                if every
                else f"row {row} says not when it was written, nor do {missing - 1:,} others of {len(texts):,}",
                where=_WHERE,
                fix="name the column of dates" if every else "fill the column, or take these rows out",
            )
        if text not in known:
            known[text] = moment_of(text)
        moment = known[text]
        if moment is None:
            raise LichenError(
                f"row {row} has {clipped(text, 60)!r}, which is no date",
                where=_WHERE,
                fix="write dates as 2018-05-03, months as 2018-05, years as 2018, or numbers",
            )
        found.append(moment)
    return found


def _compact(text: str) -> bool:
    """Whether eight digits are a date such as 20180503."""
    if not re.fullmatch(r"[12]\d{7}", text):
        return False
    try:
        datetime.strptime(text, "%Y%m%d")
    except ValueError:
        return False
    return True
