"""How long a period is, in the words of a recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, final

__all__ = ["Length", "length_of"]

Unit = Literal["day", "month", "year", "row"]

_LENGTH = re.compile(r"(?:([1-9]\d{0,6}) )?(day|month|year|row)s?")


@final
@dataclass(frozen=True, slots=True)
class Length:
    """How long a period is.

    Attributes:
        count: How many units.
        unit: Of what.
    """

    count: int
    unit: Unit


def length_of(by: str) -> Length | None:
    """What a recipe says, such as ``month``, ``20 years`` or ``500 rows``; None if it is nothing of the kind.

    >>> length_of("20 years"), length_of("month"), length_of("fortnight")
    (Length(count=20, unit='year'), Length(count=1, unit='month'), None)
    """
    found = _LENGTH.fullmatch(by.strip())
    if found is None:
        return None
    unit: Unit = found[2]  # type: ignore[assignment]
    return Length(int(found[1] or 1), unit)
