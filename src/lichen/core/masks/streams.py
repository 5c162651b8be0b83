"""The masks: words of AES-256 in counter mode, added to or taken from numbers modulo 2^64, a piece at a time.

A key makes one stream only, from counter 0, so a mask over N numbers is its first N words; words are little-endian.

References:
    Morris Dworkin. "Recommendation for Block Cipher Modes of Operation: Methods and Techniques." NIST SP 800-38A, 2001.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["add_stream", "key_stream"]

_PIECE = 1 << 15
"""Words at a time: text, stream and numbers then lie in a core's cache."""

_ZEROS = bytes(8 * _PIECE)


def key_stream(key: bytes, size: int, counter: bytes = bytes(16)) -> bytes:
    """``size`` bytes of AES-256 in counter mode.

    Args:
        key: 32 bytes.
        size: Bytes.
        counter: The first block, 16 bytes.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(bytes(size))


def add_stream(units_N: NDArray[np.int64], key: bytes, sign: int) -> None:
    """Add a key's stream to numbers where they lie, modulo 2^64.

    Args:
        units_N: Changed in place.
        key: 32 bytes.
        sign: 1, or -1 to take the stream away.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(8 * _PIECE + 15)
    words, zeros = np.frombuffer(buffer, dtype="<i8", count=_PIECE), memoryview(_ZEROS)
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, len(units_N), _PIECE):
        piece_N = units_N[start : start + _PIECE]
        encryptor.update_into(zeros[: 8 * len(piece_N)], buffer)
        combine(piece_N, words[: len(piece_N)], out=piece_N)
