"""What holders open, held against what dealers have committed to and advertised.

Legend: k neighbours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from lichen.core.masks.keys import public_of
from lichen.core.masks.layout import COMMITMENT, KEY, NOTHING, PUBLIC, SECRET, SEED, digest
from lichen.core.masks.shares import commitment

__all__ = ["advertised", "good_shares"]


def good_shares(
    context: bytes,
    around: Mapping[int, tuple[int, ...]],
    commitments: Mapping[int, NDArray[np.uint8]],
    arrived: Collection[int],
    opened: Mapping[int, NDArray[np.uint8]],
) -> tuple[dict[int, dict[int, bytes]], dict[int, str]]:
    """The shares that are what their dealers committed to.

    Args:
        context: Of the talk.
        around: By client, its neighbours in order.
        commitments: By dealer ``(k + 1, 2, 32)``; of those who got through.
        arrived: Whose masked numbers did.
        opened: By holder ``(k + 1, OPENING)``.

    Returns:
        By dealer whose secret is needed, its shares by number; and by holder who opened something else, what.
    """
    good: dict[int, dict[int, bytes]] = {
        dealer: {} for dealer in commitments if dealer in arrived or set(around[dealer]) & set(arrived)
    }
    liars: dict[int, str] = {}
    for holder, rows in opened.items():
        dealt = [(i, dealer, around[dealer].index(holder)) for i, dealer in enumerate(around[holder])]
        last = len(rows) - 1
        for i, dealer, position in [*dealt, (last, holder, last)]:
            row = rows[i].tobytes()
            kind, share, salt = row[0], row[1 : 1 + SECRET], row[1 + SECRET :]
            if kind == NOTHING or dealer not in good:
                continue
            if kind != (SEED if dealer in arrived else KEY):
                liars[holder] = f"it opened the other secret of client {dealer}"
            elif commitment(context, dealer, holder, kind, share, salt) != (
                commitments[dealer][position, kind - 1].tobytes()
            ):
                liars[holder] = f"it opened a share of client {dealer} that was not dealt to it"
            else:
                good[dealer][position + 1] = share
    return good, liars


def advertised(context: bytes, dealer: int, kind: int, secret: bytes, advert: bytes) -> bool:
    """Whether a secret is the one that its dealer has advertised, as a commitment or as a public key."""
    if kind == KEY:
        return public_of(secret) == advert[:PUBLIC]
    return digest("seed", context, dealer, secret) == advert[2 * PUBLIC : 2 * PUBLIC + COMMITMENT]
