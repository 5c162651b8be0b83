"""How the messages of masked sums lie in bytes, and how what is hashed and signed is framed.

===========  ======================================================================================================
row          what it holds, in this order
===========  ======================================================================================================
advert       public key for masks 32, public key for boxes 32, commitment to the seed 32, signature 64
sealed       nonce 12, AES-256-GCM of the body 96 + 16, commitments to the body's two shares 64
body         share of the seed 32, its salt 16, share of the private mask key 32, its salt 16
opened       kind 1, share 32, salt 16
===========  ======================================================================================================
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lichen.core.errors import LichenError

__all__ = [
    "ADVERT",
    "COMMITMENT",
    "KEY",
    "NONCE",
    "NOTHING",
    "OPENING",
    "PUBLIC",
    "SALT",
    "SEALED",
    "SECRET",
    "SEED",
    "SIGNATURE",
    "digest",
    "frame",
    "refused",
    "shaped",
    "signed_part",
]

SECRET = PUBLIC = COMMITMENT = 32
SIGNATURE, SALT, NONCE, _TAG = 64, 16, 12, 16

ADVERT = 2 * PUBLIC + COMMITMENT + SIGNATURE
"""Bytes of an advert."""

SEALED = NONCE + 2 * (SECRET + SALT) + _TAG + 2 * COMMITMENT
"""Bytes of a sealed pair of shares."""

OPENING = 1 + SECRET + SALT
"""Bytes of an opened share."""

NOTHING, SEED, KEY = 0, 1, 2
"""What an opened row holds: nothing, a share of the seed of a self mask, or one of a private mask key."""


def frame(*parts: bytes | int | str) -> bytes:
    """Parts as bytes of which only these parts come: each behind its kind and length.

    >>> frame("ab", "c") == frame("a", "bc")
    False
    """
    out = bytearray()
    for part in parts:
        kind = b"b" if isinstance(part, bytes) else b"s" if isinstance(part, str) else b"i"
        body = part if isinstance(part, bytes) else str(part).encode()
        out += kind + len(body).to_bytes(8, "big") + body
    return bytes(out)


def digest(*parts: bytes | int | str) -> bytes:
    """SHA-256 of framed parts, 32 bytes."""
    return hashlib.sha256(frame("lichen masks", *parts)).digest()


def signed_part(context: bytes, client: int, advert: bytes) -> bytes:
    """What the signature in an advert is over."""
    return frame("lichen masks advert", context, client, advert[: ADVERT - SIGNATURE])


def refused(what: str, fix: str = "repeat the round without it") -> LichenError:
    """The error that ends a client's part, or the round."""
    return LichenError(what, where="masks", fix=fix, reason="masks")


def shaped(name: str, array: NDArray[Any], shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Refuse an array of another shape or type."""
    if array.shape != shape or array.dtype != dtype:
        found = f"{name} are {array.dtype} {array.shape} and not {np.dtype(dtype)} {shape}"
        raise refused(found, "send what was asked for")
