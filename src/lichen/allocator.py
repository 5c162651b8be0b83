"""Keeps large buffers in the process, so that the next training step need not ask the system for them.

glibc maps every block above a threshold (at most 32 MB by itself) afresh and unmaps it when it is
freed. A training step frees and asks for the same large buffers over and over, so each step pays for
zeroed pages once more. With a high threshold freed blocks stay in the process and are handed out
again. What the process takes at most stays the same; what it holds in between falls later.

Only a program of its own does this, never an imported library: the setting is the whole process's.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping

__all__ = ["give_back", "keep_large_buffers", "keeps_large_buffers"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of the options in glibc's ``malloc.h``."""
_NEVER = 2**31 - 1
_LARGE = 2**30


def keep_large_buffers(environment: Mapping[str, str] = os.environ) -> bool:
    """Set malloc's thresholds high; whether it was done.

    It is not where the C library is not glibc, or where the user has set any of them
    (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) himself.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    chosen = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    if any(name in environment for name in chosen):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another allocator stands in for the C library's
        return False
    done = bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, _NEVER))
    _set.append(done)
    return done


_set: list[bool] = []
"""What became of the calls in this process: the setting is the whole process's, and cannot be asked for."""


def keeps_large_buffers() -> bool:
    """Whether :func:`keep_large_buffers` was done in this process."""
    return any(_set)


def give_back() -> bool:
    """Return to the system what has been freed and is kept, as between two runs of one process; whether any was."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):
        return False
