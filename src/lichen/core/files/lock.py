"""One folder, one process: a lock that the system frees when its owner ends, however that ends."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lichen.core import private
from lichen.core.errors import LichenError

__all__ = ["one_process"]


@contextmanager
def one_process(
    folder: Path, file: str, *, say: Callable[[str], None], refusal: LichenError | None = None
) -> Iterator[None]:
    """Hold a folder for this process alone.

    Args:
        folder: The folder; made if need be.
        file: The lock's file within; it is left there.
        say: Told where the file system knows no locks.
        refusal: The error where another process holds it; None: that it works on the folder.

    Raises:
        LichenError: if another process holds it.
    """
    path = folder / file
    private.make_folders(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), private.FILE)
    try:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait until that has ended, or choose another --out"
            raise refusal or LichenError("another process works on it", where=str(folder), fix=fix) from None
        except (ImportError, OSError):
            say(f"{folder}: files cannot be locked here; see to it that no second process works on this folder")
        yield
    finally:
        os.close(handle)
