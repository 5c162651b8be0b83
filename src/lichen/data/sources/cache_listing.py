"""Lists the cache folder: kind, size, age, and whether it holds private rows.

Only what Lichen itself has put there is known, by its name; anything else in the folder is never listed and
never removed. Links are not followed.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from lichen.core.errors import LichenError
from lichen.data.sources.entries import CATALOG, cache_dir
from lichen.data.sources.sealed import check_entry, has_digests

__all__ = ["Group", "clear", "items", "verify"]

Group = Literal["private", "models", "all"]
"""What can be cleared: what is made of private rows; what can be fetched again; both."""

_KEY = r"[0-9a-f]{64}"
_PREPARED = re.compile(rf"\.?{_KEY}\.safetensors(\.\d+\.part)?")
_SCRATCH = re.compile(r"\.?scratch-[0-9a-f]{16}((\.old)?\.\d+(\.part)?)?")
_GGUF = re.compile(r"\.?gguf-[0-9a-f]{16}((\.old)?\.\d+(\.part)?)?")
_ANSWER = re.compile(rf"\.?{_KEY}\.json(\.\d+\.part)?")
_ENTRY = re.compile(rf"({'|'.join(map(re.escape, CATALOG))})-[0-9a-f]{{12}}")
_UNFINISHED = re.compile(rf"\.({'|'.join(map(re.escape, CATALOG))})\..*\.part")
_LONGEST = 24 * 3600.0
"""Seconds that a download may take; what is older was left by a kill."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing in the cache.

    Attributes:
        what: In words.
        private: Holds what was made of private rows.
        paths: Its files and folders, all of them in the cache folder.
        bytes: What they take.
        used: When the newest of its files was last written or used, in seconds since 1970.
        place: The folder that a person would look into.
    """

    what: str
    private: bool
    paths: tuple[Path, ...]
    bytes: int
    used: float
    place: Path


def items(home: Path | None = None) -> list[Item]:
    """Everything of Lichen's in the cache folder, private things first, then the largest.

    Args:
        home: The cache folder; by default the one in use.
    """
    home = _top(home)
    old = [
        one for path in _named(home, _UNFINISHED) if time.time() - (one := _whole(_PART, False, path)).used > _LONGEST
    ]
    found = [
        _item("token ids of private rows", True, home / "private" / "prepared", _PREPARED),
        _item("answers of foundation models", True, home / "answers", _ANSWER, deep=True),
        *(_whole("a model with words of private rows", True, path) for path in _named(home / "private", _SCRATCH)),
        _item("rows of public data", False, home / "prepared", _PREPARED),
        _item("what was found of models", False, home / "findings", _PREPARED),
        *(_whole("a model drawn from nothing", False, path) for path in _named(home, _SCRATCH)),
        *(_whole("a model read from a GGUF file", False, path) for path in _named(home, _GGUF)),
        *(_whole(_entry(path), False, path) for path in _named(home, _ENTRY)),
        *old,
    ]
    return sorted((one for one in found if one is not None), key=lambda one: (not one.private, -one.bytes))


def verify(home: Path | None = None) -> Iterator[tuple[Path, str]]:
    """Read every model and data set that was fetched or made, and hold it against its digests.

    Files of rows and answers carry their digest, and are held against it each time they are used.

    Args:
        home: The cache folder; by default the one in use.

    Yields:
        Each folder, and what is wrong with it; empty if nothing is.
    """
    for item in items(home):
        folder = item.place
        if not folder.is_dir() or folder.name.startswith(".") or item.paths != (folder,):
            continue
        if not has_digests(folder):
            yield folder, "has no digests: an earlier version put it there"
            continue
        name = folder.name.rpartition("-")[0]
        fix = f"fetch it again: lichen fetch {name}" if name in CATALOG else "remove it: it is made again when needed"
        try:
            check_entry(folder, fix=fix, quick=False)
        except LichenError as error:
            yield folder, str(error)
        else:
            yield folder, ""


def clear(group: Group, home: Path | None = None) -> int:
    """Remove things from the cache folder, and nothing else; the bytes that were freed.

    Args:
        group: What goes.
        home: The cache folder; by default the one in use.
    """
    home = _top(home)
    freed = 0
    for item in items(home):
        if group == "all" or item.private == (group == "private"):
            for path in item.paths:
                _remove(path)
            freed += item.bytes
    own = (home / "private" / "prepared", home / "private", home / "prepared", home / "findings")
    for folder in (*own, *_pairs(home / "answers"), home / "answers"):
        with suppress(OSError):
            folder.rmdir()  # only an empty one goes
    return freed


_PART = "an unfinished download"


def _top(home: Path | None) -> Path:
    return (cache_dir() if home is None else home).resolve()


def _entry(path: Path) -> str:
    name = path.name.rpartition("-")[0]
    return f"the {CATALOG[name].kind} {name}"


def _real(path: Path) -> bool:
    """Whether a folder is there, itself and not by a link."""
    return path.is_dir() and not path.is_symlink()


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    if not _real(folder):
        return []
    try:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    except OSError:
        return []


def _pairs(answers: Path) -> list[Path]:
    """The folders of two digits that answers lie in."""
    return [path for path in _named(answers, re.compile(r"[0-9a-f]{2}")) if _real(path)]


def _item(what: str, private: bool, folder: Path, pattern: re.Pattern[str], *, deep: bool = False) -> Item | None:
    """Files in a folder, as one thing; None where there are none."""
    homes = _pairs(folder) if deep else [folder]
    paths = tuple(path for home in homes for path in _named(home, pattern))
    return _sized(what, private, paths, paths, folder) if paths else None


def _whole(what: str, private: bool, path: Path) -> Item:
    """A folder with all that is in it."""
    return _sized(what, private, (path,), _below(path), path)


def _below(path: Path) -> Iterator[Path]:
    yield path
    for folder, folders, files in os.walk(path) if _real(path) else ():
        yield from (Path(folder, name) for name in (*folders, *files))


def _sized(what: str, private: bool, paths: Sequence[Path], files: Iterable[Path], place: Path) -> Item:
    size, used = 0, 0.0
    for file in files:
        with suppress(OSError):
            about = file.lstat()
            size += about.st_size if stat.S_ISREG(about.st_mode) else 0
            used = max(used, about.st_mtime)
    return Item(what=what, private=private, paths=tuple(paths), bytes=size, used=min(used, time.time()), place=place)


def _remove(path: Path) -> None:
    """A file, a link (not what it leads to), or a folder with all that is in it."""
    with suppress(FileNotFoundError):
        if _real(path):
            shutil.rmtree(path)
        else:
            path.unlink()
