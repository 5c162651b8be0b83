"""What a machine refuses, in the words of who uses it: no space, no rights, no memory, limits of its system.

These are no faults of a program and no bad input, but they have a place and a fix as bad input has.
"""

from __future__ import annotations

import errno
import os
import re

from lichen.core.errors import LichenError
from lichen.core.visible import clipped

__all__ = ["machine_fault"]

_PATH = "choose a place where you may write, or change its rights"
_FAULTS = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("your share of the disk is full", "make room"),
    errno.EROFS: ("can only be read: its file system lets nobody write", "choose another place"),
    errno.EACCES: ("you have no right to this", _PATH),
    errno.EPERM: ("you have no right to this", _PATH),
    errno.ENAMETOOLONG: ("its name is too long for the file system", "choose a shorter one"),
    errno.ENOTDIR: ("something on this path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("is a folder where a file should be", "choose another path, or move the folder away"),
    errno.EEXIST: ("is a file where a folder should be", "choose another path, or move the file away"),
    errno.ELOOP: ("its links lead in a circle", "choose another path"),
    errno.EBUSY: ("is in use by the system", "choose another path"),
    errno.EIO: ("the device cannot be read or written", "look after the disk: the system's log tells more"),
    errno.ESTALE: ("the network's file system has lost it", "mount it again"),
    errno.EFBIG: ("would be larger than files may be here", "raise the limit: ulimit -f unlimited"),
    errno.EMFILE: ("more files are open than this process may have", "raise the limit: ulimit -n 4096"),
    errno.ENFILE: ("more files are open than this machine can have", "end other programs"),
    errno.EAGAIN: ("no more processes or threads may be started", "end other programs, or raise the limit: ulimit -u"),
    errno.ENOMEM: ("there is not enough memory", ""),
}

_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Unable to allocate|bad_alloc|Cannot allocate memory"
    r"|[Ss]torage size calculation overflowed|multiplication overflow|Array size too big|array is too big",
)
_NO_THREADS = re.compile(r"can't start new thread|Resource temporarily unavailable")
_NUMBER = re.compile(r"os error (\d+)|code: (\d+)")
"""How libraries in Rust tell the system's error."""

_LESS = (
    "take a smaller model, a smaller federation.batch_size or engine.clients_per_block, or end other programs; "
    "lichen plan tells what a recipe needs"
)


def machine_fault(error: BaseException, *, where: str = "") -> LichenError | None:
    """What the machine refused, in a sentence; None where the error is something else.

    Args:
        error: What came up.
        where: The place, where the error itself names none.

    >>> print(machine_fault(OSError(errno.EROFS, "Read-only file system", "/media/runs")))
    /media/runs: can only be read: its file system lets nobody write
      fix: choose another place
    """
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(text)) and type(error).__name__ == "SafetensorError":
        number = int(found[1] or found[2])
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        number = errno.ENOMEM
    elif isinstance(error, RuntimeError) and _NO_THREADS.search(text):
        number = errno.EAGAIN
    elif isinstance(error, FileNotFoundError) and "temporary directory" in text:
        return LichenError("there is no folder for temporary files", where="TMPDIR", fix="name one that you may write")
    elif isinstance(error, RuntimeError) and "home directory" in text:
        return LichenError("you have no home folder", where="HOME", fix="set it, or LICHEN_CACHE to a folder of yours")
    if number not in _FAULTS:
        return None
    what, fix = _FAULTS[number]
    named = error.filename if isinstance(error, OSError) else None
    place = clipped(os.fsdecode(named), 120) if isinstance(named, (str, bytes)) and named else where
    size = re.search(r"allocate ([\d.]+ ?\w+)", text)
    if number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
        place = where  # whatever it was opened for
    if number == errno.ENOMEM:
        fix = _LESS
        what += f": {size[1]} at once" if size else ""
    return LichenError(what, where=place, fix=fix, reason="machine")
