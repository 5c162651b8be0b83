"""Shares a budget out to the cent: a floor for everybody, the rest by what each has brought.

    share_k = f / N + (1 − f) · x_k / Σ x

over the N clients whose x is not below zero; one whose value is below zero is paid nothing, not even the floor. Shares
are fractions, and cents go by the largest remainder (Hamilton's method), so that they add up to the budget exactly; of
equal remainders the first in the roster has the cent.

References:
    Michel L. Balinski and H. Peyton Young. "Fair Representation: Meeting the Ideal of One Man, One Vote." 1982.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple, final

from lichen.core.errors import LichenError

__all__ = ["Payment", "amount", "cents_of", "floor_of", "shared_out"]

MOST = Decimal(10) ** 15
"""A budget stays below it."""


@final
class Payment(NamedTuple):
    """What a client is paid.

    Attributes:
        cents: In all.
        floor: Of these, the part that is equal for all who are paid.
        share: Of the budget; the exact one, before it is rounded to cents.
    """

    cents: int
    floor: int
    share: Fraction


def shared_out(budget: int, brought: Sequence[float], floor: Fraction) -> list[Payment]:
    """What each client is paid.

    Args:
        budget: In cents.
        brought: What each has brought, finite; below zero is paid nothing.
        floor: Share of the budget that is shared equally.

    Raises:
        LichenError: if nobody has brought anything, and the floor is not everything.

    >>> [paid.cents for paid in shared_out(1000, [2.0, 1.0, -5.0, 0.0], Fraction(1, 10))]
    [634, 333, 0, 33]
    """
    exact = [Fraction(x) for x in brought]
    counted = [x for x in exact if x >= 0]
    total = sum(counted)
    if not counted or (not total and floor < 1):
        raise LichenError(
            "nobody has brought anything that could be paid for", where="--by", fix="use --by equal, or rows"
        )
    equal = floor / len(counted)
    shares = [equal + ((1 - floor) * x / total if total else 0) if x >= 0 else Fraction(0) for x in exact]
    quotas = [budget * share for share in shares]
    cents = [int(quota) for quota in quotas]
    left = budget - sum(cents)
    for place in sorted(range(len(cents)), key=lambda k: (cents[k] - quotas[k], k))[:left]:
        cents[place] += 1
    # Of a client without anything but the floor, the odd cent belongs to that.
    floors = [
        paid if share == equal else min(paid, int(budget * equal)) for paid, share in zip(cents, shares, strict=True)
    ]
    return [Payment(*one) for one in zip(cents, floors, shares, strict=True)]


def amount(cents: int) -> str:
    """An amount as people write it.

    >>> amount(123456), amount(5)
    ('1234.56', '0.05')
    """
    return f"{cents // 100}.{cents % 100:02d}"


def cents_of(budget: str) -> int:
    """The cents of an amount that somebody has written.

    Raises:
        LichenError: if it is no amount above zero, or has parts of cents.
    """
    found = _decimal(budget)
    if found is None or not 0 < found < MOST or found * 100 != int(found * 100):
        raise LichenError(
            f"{budget!r} is no amount above zero in whole cents", where="--budget", fix="write it such as 1000.00"
        )
    return int(found * 100)


def floor_of(floor: str) -> Fraction:
    """A share from 0 to 1 that somebody has written.

    Raises:
        LichenError: if it is none.
    """
    found = _decimal(floor)
    if found is None or not 0 <= found <= 1 or found.as_tuple().exponent < -9:  # type: ignore[operator]
        raise LichenError(f"{floor!r} is no share from 0 to 1", where="--floor", fix="write it such as 0.1")
    return Fraction(found)


def _decimal(text: str) -> Decimal | None:
    try:
        found = Decimal(text)
    except InvalidOperation:
        return None
    return found if found.is_finite() else None
