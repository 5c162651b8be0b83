"""Cuts secrets of 32 bytes into shares, of which a threshold opens them and fewer say nothing, and commits to shares.

    p(x) = secret + c_1 x + ... + c_{t-1} x^{t-1}   over GF(2^128), for each half of the secret

Share x is p(x), x = 1, 2, ... . The field is the one of pycryptodome, and the shares are those of its ``split`` and
``combine``. But coefficients follow from a key here, so that a talk that begins again deals the same shares, and what
each share counts is computed once for all secrets that the same ones open. A wrong share goes unnoticed in such sums,
so each has a commitment: a hash of it and of a salt that travels with it.

References:
    Adi Shamir. "How to Share a Secret." Communications of the ACM 22(11), 1979.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from lichen.core.masks.keys import derive
from lichen.core.masks.layout import KEY, SALT, SECRET, SEED, digest
from lichen.core.masks.streams import key_stream

if TYPE_CHECKING:
    from Crypto.Protocol.SecretSharing import _Element

__all__ = ["combine", "commitment", "deal", "deal_both"]

_HALF = SECRET // 2


def deal(secret: bytes, threshold: int, xs: Iterable[int], key: bytes) -> dict[int, bytes]:
    """Shares of a secret, 32 bytes each.

    Args:
        secret: 32 bytes.
        threshold: How many shares open it.
        xs: Which shares, from 1.
        key: 32 secret bytes, used for nothing else.

    Returns:
        The shares by number.

    >>> shares = deal(b"x" * 32, 2, (1, 2, 3), bytes(32))
    >>> combine({x: shares[x] for x in (1, 3)}) == b"x" * 32
    True
    """
    from Crypto.Protocol.SecretSharing import _Element

    pad = key_stream(key, SECRET * (threshold - 1))
    coefficients = [*(pad[start : start + SECRET] for start in range(0, len(pad), SECRET)), secret]
    halves = [[_Element(c[:_HALF]) for c in coefficients], [_Element(c[_HALF:]) for c in coefficients]]
    shares = {}
    for x in xs:
        at, out = _Element(x), b""
        for half in halves:
            value = _Element(0)
            for coefficient in half:
                value = at * value + coefficient
            out += value.encode()
        shares[x] = out
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of as many shares as its threshold, by number; another secret where one of them is wrong."""
    from Crypto.Protocol.SecretSharing import _Element

    secret = b""
    for half in (slice(0, _HALF), slice(_HALF, SECRET)):
        value = _Element(0)
        for share, weight in zip(shares.values(), _weights(tuple(shares)), strict=True):
            value = value + weight * _Element(share[half])
        secret += value.encode()
    return secret


@lru_cache(maxsize=256)
def _weights(xs: tuple[int, ...]) -> tuple[_Element, ...]:
    """What each share counts in p(0), after Lagrange; the same for all secrets of which these shares are at hand."""
    from Crypto.Protocol.SecretSharing import _Element

    points, weights = [_Element(x) for x in xs], []
    for i, own in enumerate(points):
        over, under = _Element(1), _Element(1)
        for other in points[:i] + points[i + 1 :]:
            over, under = other * over, (own + other) * under
        weights.append(over * under.inverse())
    return tuple(weights)


def commitment(context: bytes, dealer: int, holder: int, kind: int, share: bytes, salt: bytes) -> bytes:
    """Binds a dealer to a holder's share of one kind, and says nothing of it to whoever lacks the salt; 32 bytes."""
    return digest("share", context, dealer, holder, kind, share, salt)


def deal_both(
    context: bytes, dealer: int, holders: Mapping[int, int], threshold: int, secrets: Mapping[int, bytes], key: bytes
) -> dict[int, tuple[bytes, bytes]]:
    """Shares of a dealer's two secrets, each with its salt, and commitments to them.

    Args:
        context: Of the talk.
        dealer: Whose secrets they are.
        holders: Clients, by the number of their share.
        threshold: How many shares open a secret.
        secrets: The seed and the private mask key, by kind.
        key: 32 secret bytes, others where anything else differs.

    Returns:
        By the number of the share: share and salt of the seed, then of the key; and the commitments to both.
    """
    dealt = {kind: deal(secrets[kind], threshold, holders, derive(key, "polynomial", kind)) for kind in (SEED, KEY)}
    out = {}
    for x, holder in holders.items():
        salts = {kind: derive(key, "salt", kind, x)[:SALT] for kind in (SEED, KEY)}
        body = b"".join(dealt[kind][x] + salts[kind] for kind in (SEED, KEY))
        hashes = [commitment(context, dealer, holder, kind, dealt[kind][x], salts[kind]) for kind in (SEED, KEY)]
        out[x] = body, b"".join(hashes)
    return out
