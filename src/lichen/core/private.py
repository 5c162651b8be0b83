"""Writes files and folders that only their owner can read.

A folder that is there already belongs to whoever made it: its mode is left alone. Where a file system
knows no modes, files are written without them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["FILE", "FOLDER", "create", "make_folder", "make_folders", "share", "tighten"]

FILE, FOLDER = 0o600, 0o700
"""Modes of what is private."""


def make_folders(path: str | Path, *, shared: bool = False) -> list[str]:
    """Make a folder and all that are missing above it, each of them private unless ``shared``.

    Returns:
        The folders that got a new name by it: those above the ones that were made.
    """
    path = str(path)
    above = os.path.dirname(path) or "."
    try:
        os.mkdir(path, 0o777 if shared else FOLDER)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return []
    except FileNotFoundError:
        return [*make_folders(above, shared=shared), *make_folders(path, shared=shared)]
    if not shared:
        with suppress(OSError):
            os.chmod(path, FOLDER)  # a umask may have taken the owner's own rights
    return [above]


def make_folder(path: Path) -> None:
    """Make one private folder; those missing above it are made as usual."""
    path.parent.mkdir(parents=True, exist_ok=True)
    make_folders(path)


def create(path: str | Path, *, shared: bool = False) -> int:
    """Open a new file for writing, in place of one that lies there.

    Args:
        path: In a folder that exists.
        shared: With the usual mode, as the umask says.

    Returns:
        A file descriptor.
    """
    how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    mode = 0o666 if shared else FILE
    try:
        file = os.open(path, how, mode)
    except FileExistsError:  # what a kill has left; its mode may be another, and it may be a link
        os.unlink(path)
        file = os.open(path, how, mode)
    if not shared:
        with suppress(OSError, AttributeError):
            os.fchmod(file, FILE)
    return file


def tighten(path: Path) -> None:
    """Make a folder and all in it private; links are left alone."""
    for folder, _, names in os.walk(path):
        with suppress(OSError):
            os.chmod(folder, FOLDER)
        for name in names:
            file = os.path.join(folder, name)
            with suppress(OSError):
                if not os.path.islink(file):
                    os.chmod(file, FILE)


def share(path: Path) -> None:
    """Give the files of a folder the modes that new ones have; some libraries write theirs for the owner alone."""
    sample = path / f".mode.{os.getpid()}"
    file = create(sample, shared=True)
    usual = os.fstat(file).st_mode & 0o777
    os.close(file)
    sample.unlink()
    for one in path.iterdir():
        if one.is_file() and not one.is_symlink():
            with suppress(OSError):
                one.chmod(usual)
