"""Says of a folder's files how long they are and which digest they have; written last, so that what it names is whole.

The list carries a digest of itself. Beside each file's size and SHA-256 stands when it was last changed: where that is
as it was, a quick look is enough; else the file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic

__all__ = ["MANIFEST", "check", "digest_of", "file_digest", "files_in", "seal", "sealed", "sha256_of"]

MANIFEST = "manifest.json"
"""The list of a finished run's files."""


def digest_of(data: bytes) -> str:
    """The first 32 hex digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


def file_digest(path: str | Path) -> str | None:
    """:func:`digest_of` a file; None if there is none that can be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    """The whole SHA-256 of a file, 64 hex digits.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(folder: Path, *, but: Iterable[str] = ()) -> list[str]:
    """All files below a folder by their path within, in order, without those that begin with one of ``but``."""
    every = (Path(top, name).relative_to(folder).as_posix() for top, _, names in os.walk(folder) for name in names)
    leave = tuple(but)
    return sorted(name for name in every if not name.startswith(leave))


def seal(folder: Path, file: str, names: Iterable[str], *, about: str = "", shared: bool = False) -> None:
    """Write down what these files are.

    Args:
        folder: Where they lie.
        file: The list's name within.
        names: Each file by its path within.
        about: What the folder is, so that no other one passes for it.
        shared: With the usual modes.
    """
    body = {"about": about, "files": {name: _entry(folder / name) for name in names}}
    write_atomic(folder / file, json.dumps(_signed(body), indent=1).encode() + b"\n", shared=shared)


def _entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": whole, "changed": _changed(os.fstat(file.fileno()))}


def _changed(about: os.stat_result) -> list[int]:
    return [about.st_mtime_ns, about.st_ctime_ns]


def _signed(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def sealed(folder: Path, file: str) -> bool:
    """Whether the folder has a list at all; those of earlier versions have none."""
    return (folder / file).is_file()


def check(
    folder: Path,
    file: str,
    names: Iterable[str] | None = None,
    *,
    fix: str,
    about: str = "",
    quick: bool = False,
    whole: bool = False,
) -> None:
    """Hold a folder's files against its list; nothing is said where there is none.

    Args:
        folder: The folder.
        file: The list's name within.
        names: Those to look at, as far as the list has them; None: all.
        fix: What mends a damaged one.
        about: What the folder is.
        quick: Read only files that were changed since they were last read.
        whole: Other files than those of the list are damage, too.

    Raises:
        LichenError: naming the first file that is damaged or missing.
    """
    if not sealed(folder, file):
        return
    body, files = _list(folder / file, about, fix)
    if whole and (more := sorted({*files_in(folder, but=(file, ".")), *()} - files.keys())):
        raise LichenError("does not belong there", where=str(folder / more[0]), fix=fix)
    again = False
    for name in files if names is None else [one for one in names if one in files]:
        path, known = folder / name, files[name]
        try:
            found = path.stat()
            same = found.st_size == known["bytes"]
            if same and not (quick and _changed(found) == known["changed"]):
                now = _entry(path)
                again, same = again or now != known, now["sha256"] == known["sha256"]
                files[name] = now
        except OSError:
            raise LichenError("is missing or cannot be read", where=str(path), fix=fix) from None
        if not same:
            raise LichenError("is damaged: its digest is another than when it was written", where=str(path), fix=fix)
    if quick and again:  # it was copied or touched: the next look is quick again
        with suppress(OSError):
            write_atomic(folder / file, json.dumps(_signed(body), indent=1).encode() + b"\n", shared=True)


def _list(path: Path, about: str, fix: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        mark = body.pop("sha256")
        whole = _signed(body)["sha256"] == mark and body["about"] == about
        files: dict[str, dict[str, Any]] = body["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise LichenError("is damaged", where=str(path), fix=fix) from None
    return body, files
