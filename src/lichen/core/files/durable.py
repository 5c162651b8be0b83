"""Writes files and folders so that a reader, a kill or a power cut sees the old one or the new one, never a part.

A new file is written beside its place, under a name that begins with a dot and ends in ``.part``; it is forced to the
disk, renamed, and the folder that holds the name is forced to the disk, too. What a kill leaves of it goes by
:func:`sweep` at the next start.

All of it is private unless a caller says otherwise: files of mode 0600 in folders of 0700.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lichen.core import private

__all__ = ["PART", "link_file", "place_file", "rename_folder", "sweep", "whole_folder", "write_all", "write_atomic"]

PART = ".part"
"""How the name of what is not whole ends."""


def write_atomic(path: Path, data: bytes, *, shared: bool = False) -> None:
    """Write a file so that a reader, a kill or a power cut at any moment leaves the old one or the new one.

    Args:
        path: The file; folders missing above it are made.
        data: All of it.
        shared: For others too, with the usual modes; else only the owner can read the file and the folders made.
    """
    changed = private.make_folders(path.parent, shared=shared)
    part = path.with_name(_part(path.name))
    with open(private.create(part, shared=shared), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    for folder in (str(path.parent), *changed):
        _sync(folder)


def write_all(contents: Mapping[str, bytes]) -> None:
    """:func:`write_atomic` for many small private files: all are written before the first one is waited for."""
    parts: list[tuple[str, str, int]] = []
    changed: dict[str, None] = {}
    try:
        for path, data in contents.items():
            folder, _, name = path.rpartition("/")
            part = f"{folder}/{_part(name)}"
            changed[folder] = None
            parts.append((part, path, _write(part, data, changed)))
        for _, _, file in parts:
            os.fsync(file)
    finally:
        for _, _, file in parts:
            os.close(file)
    for part, path, _ in parts:
        os.replace(part, path)
    for folder in changed:
        _sync(folder)


def _part(name: str) -> str:
    return f".{name}.{os.getpid()}{PART}"


def _write(path: str, data: bytes, changed: dict[str, None]) -> int:
    """Write a new private file, in a new private folder if need be, and leave it open."""
    try:
        file = private.create(path)
    except FileNotFoundError:
        changed.update(dict.fromkeys(private.make_folders(os.path.dirname(path))))
        file = private.create(path)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]
    return file


def _sync(folder: str | Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:
        return
    try:
        with suppress(OSError):  # some file systems have no such thing
            os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(target: Path, *, shared: bool = True, replace: bool = True) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``target`` when all of it is there.

    Args:
        target: The folder; what lies there goes once the new one is whole.
        shared: With the usual modes.
        replace: Else whoever was quicker has made the same, and is left alone.
    """
    target = Path(os.path.abspath(target))
    if os.path.ismount(target) or target == Path.cwd():  # no other folder can take its place
        yield target
        return
    changed = private.make_folders(target.parent, shared=shared)
    draft = target.with_name(_part(target.name))
    shutil.rmtree(draft, ignore_errors=True)
    private.make_folders(draft, shared=shared)
    try:
        yield draft
        rename_folder(draft, target, replace=replace)
        for folder in changed:
            _sync(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def rename_folder(draft: Path, target: Path, *, replace: bool = False) -> None:
    """Force a folder and all in it to the disk, and let it take a name.

    Args:
        draft: The folder, whole.
        target: The name.
        replace: In place of what lies there; else that is left, as whoever was quicker made it.
    """
    for folder, _, names in os.walk(draft, topdown=False):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file, suppress(OSError):
                os.fsync(file.fileno())
        _sync(folder)
    old = target.with_name(_part(f"{target.name}.old"))
    if replace and target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if replace or not target.is_dir():
            raise
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def place_file(draft: Path, target: Path, *, shared: bool = False) -> None:
    """Force a file to the disk, and let it take a name, in place of what lies there; folders missing above are made.

    Args:
        draft: The file, whole, on the same disk.
        target: The name.
        shared: With the usual modes; else for its owner alone.
    """
    changed = private.make_folders(target.parent, shared=shared)
    part = target.with_name(_part(target.name))
    os.close(private.create(part, shared=shared))
    os.chmod(draft, part.stat().st_mode & 0o777)
    with open(draft, "rb") as file, suppress(OSError):
        os.fsync(file.fileno())
    os.replace(draft, part)
    os.replace(part, target)
    for folder in (str(target.parent), *changed):
        _sync(folder)


def link_file(source: Path, target: Path) -> None:
    """Let a private file lie in a second place, too, in place of what lies there; a copy where there are no links.

    Args:
        source: The file, which is never changed, and only replaced.
        target: The other place, in a folder that is there.
    """
    part = target.with_name(_part(target.name))
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
        os.replace(part, target)
    except OSError:  # a file system without links
        write_atomic(target, source.read_bytes())


def sweep(folders: Iterable[Path]) -> int:
    """Remove what kills have left half written in these folders and below; how many things that were."""
    gone = 0
    for top in folders:
        for folder, inside, names in os.walk(top):
            for name in [one for one in (*inside, *names) if one.startswith(".") and one.endswith(PART)]:
                path = os.path.join(folder, name)
                gone += 1
                if name in inside:
                    inside.remove(name)
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(FileNotFoundError):
                        os.unlink(path)
    return gone
