"""What two clients have in common: the key of the mask between them, and the boxes that they seal for each other.

A box is bound to the context, to who seals it for whom, to both adverts and to the commitments that lie in clear beside
it. Whoever opens one therefore knows the sealer's keys as the sealer does, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lichen.core.masks.keys import agree, derive, seal, unseal
from lichen.core.masks.layout import COMMITMENT, NONCE, PUBLIC, SALT, SEALED, SECRET, frame, refused
from lichen.core.masks.shares import commitment

__all__ = ["Pair", "mask_key", "pair"]

_PART = SECRET + SALT
_FREE = SEALED - 2 * COMMITMENT


def mask_key(context: bytes, client: int, private: bytes, other: int, public: bytes) -> bytes | None:
    """The key of the mask between two clients, 32 bytes, by the private key of one and the public key of the other.

    None where the other's key is of small order, so that everybody would know it.
    """
    secret = agree(private, public)
    low, high = sorted((client, other))
    return None if secret is None else derive(secret, "mask", context, low, high)


@final
@dataclass(frozen=True, slots=True)
class Pair:
    """A client and a neighbour, as the client knows it.

    Attributes:
        context: Of the talk.
        client: Who knows it so.
        other: The neighbour.
        ours: The client's own advert.
        theirs: The neighbour's.
        mask: Key of the mask between them.
        box: Secret from which the keys of boxes follow.
    """

    context: bytes
    client: int
    other: int
    ours: bytes
    theirs: bytes
    mask: bytes
    box: bytes

    def seal(self, body: bytes, commitments: bytes, nonce: bytes) -> bytes:
        """A box for the neighbour, ``SEALED`` bytes.

        Args:
            body: A share and its salt of each kind.
            commitments: To both.
            nonce: 12 bytes, other ones for another body.
        """
        bound = frame(self.context, self.client, self.other, self.ours, self.theirs, commitments)
        return nonce + seal(self._key(self.client, self.other), nonce, body, bound) + commitments

    def unseal(self, sealed: bytes) -> bytes | None:
        """What the neighbour has sealed for the client; None where it was not sealed so."""
        bound = frame(self.context, self.other, self.client, self.theirs, self.ours, sealed[_FREE:])
        return unseal(self._key(self.other, self.client), sealed[:NONCE], sealed[NONCE:_FREE], bound)

    def parts(self, body: bytes, sealed: bytes) -> tuple[bytes | None, bytes | None]:
        """The share and salt of each kind in a box that opened; None where the neighbour has committed to another."""
        found: list[bytes | None] = []
        for kind, start in enumerate((0, _PART), start=1):
            part, promised = body[start : start + _PART], sealed[_FREE + (kind - 1) * COMMITMENT :][:COMMITMENT]
            actual = commitment(self.context, self.other, self.client, kind, part[:SECRET], part[SECRET:])
            found.append(part if actual == promised else None)
        return found[0], found[1]

    def _key(self, sealer: int, opener: int) -> bytes:
        return derive(self.box, "box", self.context, sealer, opener)


def pair(context: bytes, client: int, ours: bytes, private: tuple[bytes, bytes], other: int, theirs: bytes) -> Pair:
    """A client and a neighbour.

    Args:
        context: Of the talk.
        client: Whose private keys these are.
        ours: Its advert.
        private: Its keys for masks and for boxes.
        other: The neighbour.
        theirs: The neighbour's advert.

    Raises:
        LichenError: if the neighbour shows the client's own keys, or keys of small order.
    """
    keys, own = ((row[:PUBLIC], row[PUBLIC : 2 * PUBLIC]) for row in (theirs, ours))
    if set(keys) & set(own):
        raise refused(f"client {other} shows keys of client {client}, to which it was sent")
    mask, box = mask_key(context, client, private[0], other, keys[0]), agree(private[1], keys[1])
    if mask is None or box is None:
        raise refused(f"client {other} shows a key with which nothing is secret")
    return Pair(context, client, other, ours, theirs, mask, box)
