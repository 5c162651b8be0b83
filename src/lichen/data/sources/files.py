"""Reads the user's files and hub data sets as plain rows; errors name file and line.

There is one way to read a file, whoever asks: what ``lichen init`` sees is what a run learns from.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.visible import clipped, listed
from lichen.data.formats.delimited import delimited_rows, form_of
from lichen.data.formats.encodings import encoding_of
from lichen.data.formats.json_rows import json_rows, line_rows
from lichen.data.formats.parquet_rows import parquet_rows, plain
from lichen.data.sources.entries import near_names

__all__ = [
    "Row",
    "data_files",
    "file_rows",
    "file_stem",
    "owners_of_files",
    "read_hub",
    "read_notes",
    "read_rows",
]

Row = Mapping[str, Any]

MOST_FILES = 100_000

_SPLIT_NAMES = re.compile(
    r"(train|training|test|testing|valid|validation|val|dev|eval|data)(-\d+-of-\d+(-\w+)?)?|part-\d{4,}.*"
)
"""Names of files and folders that say what rows are for, and not whose they are."""

_CARDS = re.compile(r"(.*\.)?card\.yaml|croissant\.json")
"""Names of files that say something of rows, and are none themselves."""

_NOT_READ: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods"), ("an Excel file", "save it as CSV in UTF-8")),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), ("a file of another table format", "write it as Parquet")),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst", ".rar"), ("an archive", "unpack it")),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz"), ("a file of Python's own", "write it as JSONL")),
    **dict.fromkeys((".txt", ".md", ".log"), ("a text without rows", 'write {"text": "..."} a line, as .jsonl')),
    **dict.fromkeys((".docx", ".doc", ".pdf", ".html"), ("a document", 'write {"text": "..."} a line, as .jsonl')),
}


def file_kind(path: Path) -> str:
    """The ending that says how a file is read, without ``.gz``; empty where it is not read.

    >>> file_kind(Path("a.CSV.gz")), file_kind(Path("notes.md"))
    ('.csv', '')
    """
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    return ending if ending in _READERS else ""


def file_stem(path: Path) -> str:
    """A file's name without its ending, or endings: ``ann`` of ``ann.csv.gz``."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return Path(name).stem


def data_files(path: Path) -> list[Path]:
    """The file itself, or all readable files under a folder in name order.

    Hidden files and folders are left out, and what systems leave behind; a folder is entered once, whatever
    links lead to it.

    Raises:
        LichenError: if a folder has none, or the path is neither a file nor a folder.
    """
    try:
        return _walk(path)[0]
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror or error}", where=str(path), fix="check the path") from None


def _walk(path: Path) -> tuple[list[Path], list[str]]:
    """The files to read, and the names of those that are left out."""
    if not path.is_dir():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise LichenError("is a pipe or a device, not a file", where=str(path), fix="write its rows to a file")
        return [path], []
    found: list[Path] = []
    left: list[str] = []
    seen: set[tuple[int, int]] = set()
    for home, folders, names in os.walk(path, followlinks=True, onerror=_raise):
        about = os.stat(home)
        if (about.st_dev, about.st_ino) in seen:
            folders[:] = []
            left.append(f"{os.path.relpath(home, path)} (a second way to a folder)")
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for file in (Path(home) / name for name in sorted(names) if not _hidden(name)):
            if _CARDS.fullmatch(file.name):
                continue
            if file_kind(file) and file.is_file():
                found.append(file)
            else:
                left.append(str(file.relative_to(path)))
        if len(found) + len(left) > MOST_FILES:
            raise LichenError(
                f"holds more than {MOST_FILES:,} files", where=str(path), fix="name the folder with the data"
            )
    if not found:
        endings = ", ".join(sorted(_READERS))
        fix = f"put {endings} files in it"
        raise LichenError(
            f"holds no data files{f', only {listed(left, most=3)}' if left else ''}", where=str(path), fix=fix
        )
    return sorted(found), left


def _raise(error: OSError) -> None:
    """A folder that cannot be entered is no folder without data."""
    raise LichenError(
        f"cannot be read: {error.strerror or error}", where=str(error.filename), fix="check its permissions"
    )


def _hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name in ("__MACOSX", "__pycache__")


def owners_of_files(path: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Whose rows a file holds where no column says so: that of its folder, else its own name.

    Folders count from the deepest one that all files share. A folder or file called ``train``, ``test`` and the
    like names nobody: such a file belongs to its folder's client, and to none where it has no such folder. Where
    all files would be one client's, they are nobody's.
    """
    if path.is_file():
        return {path: ""}
    root = Path(os.path.commonpath([file.parent for file in files]))
    folders = {file: [step for step in file.parent.relative_to(root).parts if not _splits(step)] for file in files}
    owners = {
        file: "/".join(steps) or ("" if _splits(file_stem(file)) else file_stem(file))
        for file, steps in folders.items()
    }
    # Two files of one name and other endings in one folder are two clients.
    alike = Counter((file.parent, file_stem(file)) for file in files if not folders[file])
    for file, owner in owners.items():
        if owner and not folders[file] and alike[file.parent, file_stem(file)] > 1:
            owners[file] = file.name
    return owners if len(set(owners.values())) > 1 else dict.fromkeys(files, "")


def _splits(name: str) -> bool:
    """Whether a name says what rows are for, such as ``test`` or ``train-00000-of-00002``."""
    return _SPLIT_NAMES.fullmatch(name.lower()) is not None


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, one by one.

    Raises:
        LichenError: if the ending is unknown, or the file cannot be read as what it claims to be.
    """
    kind = file_kind(path)
    if not kind:
        ending = Path(path.name.lower().removesuffix(".gz")).suffix
        if ending in _NOT_READ:
            what, fix = _NOT_READ[ending]
            raise LichenError(f"is {what} ({ending}), which is not read", where=str(path), fix=fix)
        raise LichenError(
            f"cannot read {clipped(ending, 20) or 'files without an ending'}",
            where=str(path),
            fix=f"use one of: {', '.join(sorted(_READERS))}",
        )
    try:
        data_files(path)
        yield from _READERS[kind](path)
    except UnicodeError as error:
        about = f" (byte {error.start})" if isinstance(error, UnicodeDecodeError) else ""
        raise LichenError(
            f"is not whole {encoding_of(path).upper()} text{about}", where=str(path), fix="save it as UTF-8"
        ) from None
    except EOFError:
        raise LichenError("ends before its packed text does", where=str(path), fix="pack it again") from None
    except (OSError, zlib.error) as error:
        why = getattr(error, "strerror", None) or clipped(str(error), 200)
        raise LichenError(f"cannot be read: {why}", where=str(path), fix="check the file") from None


def read_rows(path: Path) -> list[Row]:
    """All rows of one file; an empty file has none.

    Raises:
        LichenError: if the ending is unknown, or the file cannot be read as what it claims to be.
    """
    return list(file_rows(path))


def read_notes(path: Path, *, most: int | None = None) -> list[str]:
    """What was assumed or left out in reading a file or folder, as sentences: letters, delimiters, skipped files.

    Args:
        path: The file or folder.
        most: How many files are looked into; None: all.

    Raises:
        LichenError: if it cannot be read.
    """
    files, left = _walk(path)
    notes: dict[str, list[str]] = {}
    for file in files[:most]:
        if file_kind(file) == ".parquet":
            continue
        encoding = encoding_of(file)
        parts = [] if encoding.startswith("utf-8") else [encoding.upper().replace("CP1252", "Windows-1252")]
        if _READERS[file_kind(file)] is delimited_rows and (words := form_of(file).words):
            parts.append(words)
        if parts:
            notes.setdefault(", ".join(parts), []).append(str(file.relative_to(path)) if file != path else file.name)
    lines = [f"{listed(names, most=3)}: read as {how}" for how, names in notes.items()]
    if left:
        lines.append(f"left out, no data: {listed(left, most=5)}")
    return lines


def read_hub(name: str) -> list[Row]:
    """The ``train`` split of a hub data set, through the optional package ``datasets``.

    Raises:
        LichenError: if the package is not installed, or the data set cannot be loaded.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise LichenError(
            f"{name!r} is no catalog name and no local path, and hub data need the package datasets",
            where="data.name",
            fix=f"pip install 'lichen[hub]', or use one of: {near_names(name, 'data')}",
        ) from None
    try:
        return [{key: plain(value) for key, value in row.items()} for row in load_dataset(name, split="train")]
    except Exception as error:
        # The hub client raises many kinds; the user needs its first line, not its traceback.
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise LichenError(
            f"the hub data set {name!r} cannot be loaded: {why}", where="data.name", fix="check the name and network"
        ) from None


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": delimited_rows,
    ".json": json_rows,
    ".jsonl": line_rows,
    ".ndjson": line_rows,
    ".parquet": parquet_rows,
    ".tab": delimited_rows,
    ".tsv": delimited_rows,
}
