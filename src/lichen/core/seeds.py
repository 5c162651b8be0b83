"""Derives every random draw from a seed and a path of names; there is no global generator."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["derive", "numpy_generator", "torch_generator"]


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one purpose, for example ``derive(seed, round, client, "shuffle")``.

    BLAKE2b over the parts, so that neighbouring paths give unrelated streams.

    >>> derive(0, 1, "shuffle") == derive(0, 1, "shuffle") != derive(0, 2, "shuffle")
    True
    """
    text = "\x1f".join([repr(int(seed)), *(repr(part) for part in path)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator seeded with :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *path))


def numpy_generator(seed: int, *path: int | str) -> np.random.Generator:
    """A NumPy generator (PCG64) seeded with :func:`derive`."""
    return np.random.default_rng(derive(seed, *path))
