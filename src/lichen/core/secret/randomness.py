"""Noise and coins that nobody can compute who has not got the key: for differential privacy.

All other draws of a run follow from the recipe's seed, which every client knows. Whoever knows the noise can subtract
it, and whoever knows who was sampled has no use for amplification. So these come from a key of 256 bits that the
operating system has drawn and that lies with the server: for each purpose another key is derived (HKDF), and AES in
counter mode makes the words. The same key and labels give the same numbers, so that a run over several processes has
the bytes of a run in one; whoever must not use noise twice takes a new label.

References:
    Hugo Krawczyk. "Cryptographic Extraction and Key Derivation: The HKDF Scheme." CRYPTO 2010.
    https://eprint.iacr.org/2010/264
    Simson L. Garfinkel and Philip Leclerc. "Randomness Concerns When Deploying Differential Privacy." WPES 2020.
    https://arxiv.org/abs/2009.03777
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.secret.discrete_gaussian import coins, discrete_gaussian

__all__ = ["GRID", "SecretRandomness", "Stream", "secret_key"]

SIZE = 32
"""Bytes of a key."""

GRID = 40
"""Bits after the point of noise, as of the sums of :mod:`lichen.server.sums.fixed_point`."""

_LEAST, _MOST = 2**24, 2**56


@final
class Stream:
    """Numbers for one purpose, one after the other: each call goes on where the last one ended.

    Args:
        key: 32 bytes, used for nothing else.
    """

    __slots__ = ("_encrypt",)

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._encrypt = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Uniform words of 64 bits."""
        return np.frombuffer(self._encrypt.update(bytes(8 * count)), dtype="<u8")

    def units(self, count: int, sigma: float, *, grid: int = GRID) -> Tensor:
        """Normal numbers, as whole units of ``2^-grid``; int64 ``(count,)``.

        Args:
            count: How many.
            sigma: Standard deviation of the numbers, not of the units; rounded up to a unit. 0: no noise.
            grid: Bits after the point.

        Raises:
            LichenError: if the grid is too coarse for such noise, or the noise leaves the range of 64 bits.
        """
        if sigma == 0:
            return torch.zeros(count, dtype=torch.int64)
        unit_sigma = math.ceil(sigma * 2.0**grid) if math.isfinite(sigma) else 0
        if not _LEAST <= unit_sigma < _MOST:
            raise LichenError(
                f"noise of {sigma:g} does not fit a grid of {grid} bits after the point",
                where="privacy.sigma",
                fix=f"let sigma times clip lie between {_LEAST * 2.0**-grid:.2g} and {_MOST * 2.0**-grid:.2g}",
            )
        return torch.from_numpy(discrete_gaussian(self.words, count, unit_sigma))

    def normal(self, shape: Sequence[int], sigma: float, *, grid: int = GRID) -> Tensor:
        """Normal numbers on the grid, float64; exact where they are below ``2^(53 - grid)``; raises as :meth:`units`.

        What they are added to has to lie on the same grid, or its low bits are told.
        """
        return (self.units(math.prod(shape), sigma, grid=grid).double() * 2.0**-grid).reshape(tuple(shape))

    def bernoulli(self, rate: float, count: int) -> Tensor:
        """Coins, each true with this chance; bool ``(count,)``.

        Raises:
            LichenError: if the rate is no chance.
        """
        if not 0 <= rate <= 1:
            raise LichenError(f"{rate} is no chance", where="coins.rate", fix="use 0 to 1")
        return torch.from_numpy(coins(self.words, count, rate))


@final
class SecretRandomness:
    """A key, and the streams that are derived from it.

    Args:
        key: 32 bytes.
        seeded: Whether the key follows from a seed, so that nothing is secret: for tests only.

    Raises:
        LichenError: if it is no key.

    >>> a, b = (SecretRandomness.of_seed(0).stream("noise", 3) for _ in range(2))
    >>> bool((a.units(5, 1.0) == b.units(5, 1.0)).all())
    True
    """

    __slots__ = ("_key", "seeded")

    def __init__(self, key: bytes, *, seeded: bool = False) -> None:
        if len(key) != SIZE:
            raise LichenError(f"a key of {len(key)} bytes", where="secret.key", fix=f"use {SIZE} random bytes")
        self._key, self.seeded = key, seeded

    @classmethod
    def of_seed(cls, seed: int) -> SecretRandomness:
        """What everybody can compute; protects nobody."""
        return cls(hashlib.sha256(f"lichen: no privacy, seed {int(seed)}".encode()).digest(), seeded=True)

    @property
    def mark(self) -> str:
        """By which the key is known; nothing of it can be found from that."""
        return hashlib.sha256(b"lichen privacy mark" + self._key).hexdigest()[:16]

    def stream(self, *labels: int | str) -> Stream:
        """The numbers of one purpose, from the first; equal labels give equal numbers."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = "\x1f".join(["lichen privacy", *(repr(label) for label in labels)]).encode()
        return Stream(HKDF(algorithm=hashes.SHA256(), length=SIZE, salt=None, info=info).derive(self._key))


def secret_key(path: Path) -> SecretRandomness:
    """The key in a file that only its owner can read; drawn by the operating system where there is none yet.

    Raises:
        LichenError: if others can read the file, or it holds no key.
    """
    if not path.exists():
        private.make_folder(path.parent)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        write_atomic(draft, os.urandom(SIZE))
        try:
            os.link(draft, path)  # never in place of a key that another process has drawn meanwhile
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.rename(draft, path)
        draft.unlink(missing_ok=True)
    if path.stat().st_mode & 0o077:
        raise LichenError("others can read this key", where=str(path), fix="chmod 600, and begin a new run")
    key = path.read_bytes()
    if len(key) != SIZE:
        raise LichenError(f"holds {len(key)} bytes and no key", where=str(path), fix="begin a new run")
    return SecretRandomness(key)
