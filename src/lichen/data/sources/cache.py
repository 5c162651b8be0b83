"""Caches prepared arrays in the cache folder, keyed by a digest of their inputs.

What is made from private rows lies apart from what is public, and goes when it has not been used for a
month. All files are of mode 0600 in folders of 0700. A kept file comes back mapped into memory. It is a
convenience and never a fault: a file that is missing, damaged or cannot be written only means that the
thing is made again.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from lichen import __version__
from lichen.core.errors import LichenError
from lichen.core.files.durable import PART
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import Tree
from lichen.data.sources.entries import cache_dir

__all__ = ["MOST_BYTES", "keep", "key_of", "prepared_folder"]

MOST_BYTES = 4 << 30
"""All files of a folder together; beyond it those that were used longest ago go."""
MOST_SECONDS = 30 * 24 * 3600.0
"""Files that nobody used for so long go."""
MOST_PART_SECONDS = 3600.0
"""How long a file may take to be written."""

_Thing = TypeVar("_Thing")


def key_of(*parts: object, code: tuple[str, ...] = ()) -> str:
    """A digest (64 hex digits) of what a thing is made from.

    Args:
        parts: Values whose ``repr`` tells them apart.
        code: Python files that make it, so that an edited one never finds what the old one left.
    """
    total = hashlib.sha256(f"lichen {__version__}\x1f".encode())
    for part in parts:
        total.update(repr(part).encode("utf-8", "surrogatepass") + b"\x1f")
    for file in code:
        total.update(Path(file).read_bytes())
    return total.hexdigest()


def prepared_folder(*, private: bool) -> Path:
    """Where prepared arrays lie in the cache folder; those made from private rows lie by themselves."""
    home = cache_dir()
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)  # as usual: what is public may be shared
        for old in (home / "prepared").glob("*.safetensors"):
            if old.stat().st_mode & 0o077:  # earlier versions kept private rows here, for everybody to read
                old.unlink(missing_ok=True)
    return home / "private" / "prepared" if private else home / "prepared"


def keep(
    key: str,
    make: Callable[[], _Thing],
    *,
    write: Callable[[_Thing], Tree | None],
    read: Callable[[Tree], _Thing],
    folder: Path | None,
    most_bytes: int = MOST_BYTES,
) -> _Thing:
    """The thing of this key, read back where it is kept, else made, and kept for the next time.

    Args:
        key: From :func:`key_of`.
        make: Makes it.
        write: Its tensors; None where it cannot be kept.
        read: Undoes ``write``; its tensors are mapped from the file.
        folder: Where the files lie, such as :func:`prepared_folder`; None: nothing is kept.
        most_bytes: What they may take together.
    """
    if folder is None:
        return make()
    file = folder / f"{key}.safetensors"
    with suppress(LichenError, KeyError, ValueError):
        found = _checked(file, key, read)
        with suppress(OSError):
            os.utime(file)
            _trim(folder, file, most_bytes)
        return found
    thing = make()
    tree = write(thing)
    if tree is None:
        return thing
    try:
        save_tree(file, tree, {"crc32": _crc32(tree), "key": key})
        _trim(folder, file, most_bytes)
        return _checked(file, key, read)
    except (OSError, LichenError):
        return thing


def _checked(file: Path, key: str, read: Callable[[Tree], _Thing]) -> _Thing:
    tree, header = load_tree(file)
    if header != {"crc32": _crc32(tree), "key": key}:  # another one's file under this name would be other rows
        raise LichenError("is damaged", where=str(file))
    return read(tree)


def _crc32(tree: Tree) -> int:
    total = 0
    for name in sorted(tree):
        x: Tensor = tree[name]
        total = zlib.crc32(x.numpy().data, zlib.crc32(f"{name}{x.dtype}{tuple(x.shape)}".encode(), total))
    return total


def _trim(home: Path, newest: Path, most_bytes: int) -> None:
    files = [(f.stat(), f) for f in home.glob("*.safetensors") if f != newest]
    bytes_left, oldest = most_bytes - newest.stat().st_size, time.time() - MOST_SECONDS
    for about, file in sorted(files, key=lambda pair: pair[0].st_mtime_ns, reverse=True):
        bytes_left -= about.st_size
        if bytes_left < 0 or about.st_mtime < oldest:
            file.unlink(missing_ok=True)
    for part in home.glob(f".*{PART}"):  # left by a kill, unless somebody writes it now
        with suppress(OSError):
            if part.stat().st_mtime < time.time() - MOST_PART_SECONDS:
                part.unlink()
