"""Finds which data card is whose, and makes the digest of rows that a card names.

Beside ``rows.csv`` lies ``rows.card.yaml``, and in a folder ``card.yaml``. Of several that could speak for a file the
nearest one does: its own, then that of its folder, then that of the folder above, up to the folder that was asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.data.sources.files import data_files, file_stem, owners_of_files

__all__ = ["CARD", "Covered", "card_place", "covered_by", "file_digests", "rows_sha256"]

CARD = "card.yaml"
_PIECE = 1 << 20


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """Files that one card speaks for, or none.

    Attributes:
        card: The card's file, None where there is none.
        rows: What its digest is of: a file, or a folder.
        files: The files that no nearer card speaks for, in name order.
        owners: Whose they are by their names, in order; those of a file that is nobody's by its own name.
    """

    card: Path | None
    rows: Path
    files: tuple[Path, ...]
    owners: tuple[str, ...]


def card_place(rows: Path) -> Path:
    """Where the card of a file or folder lies, or is to lie.

    Two files that differ in their endings alone have cards called by their whole names: ``rows.csv.card.yaml``.
    """
    if rows.is_dir():
        return rows / CARD
    return next((place for place in _own_names(rows) if place.is_file()), _own_names(rows)[_alike(rows)])


def _own_names(file: Path) -> tuple[Path, Path]:
    return file.with_name(f"{file_stem(file)}.{CARD}"), file.with_name(f"{file.name}.{CARD}")


def _alike(file: Path) -> bool:
    try:
        names = [Path(name) for name in os.listdir(file.parent)]
    except OSError:
        return False
    return any(
        file_stem(name) == file_stem(file) and name.name != file.name for name in names if name.suffix != ".yaml"
    )


def _card_of(file: Path, top: Path) -> tuple[Path, Path] | None:
    """The card's file, and what it is a card of."""
    own, whole = _own_names(file)
    if whole.is_file():
        return whole, file
    if own.is_file():
        return own, file
    folder = file.parent
    while top.is_dir():
        if (folder / CARD).is_file():
            return folder / CARD, folder
        if folder in (top, folder.parent):
            break
        folder = folder.parent
    return None


def covered_by(path: Path) -> list[Covered]:
    """All files of a file or folder, by the card that speaks for each; those without one come last, each by itself.

    Raises:
        LichenError: as :func:`lichen.data.sources.files.data_files`.
    """
    files = data_files(path)
    owners = owners_of_files(path, files)
    found: dict[tuple[Path, Path], list[Path]] = {}
    bare: list[Path] = []
    for file in files:
        place = _card_of(file, path)
        found.setdefault(place, []).append(file) if place is not None else bare.append(file)
    some = [(card, rows, of) for (card, rows), of in found.items()] + [(None, file, [file]) for file in bare]
    return [
        Covered(card=card, rows=rows, files=tuple(of), owners=tuple(dict.fromkeys(owners[f] or f.name for f in of)))
        for card, rows, of in some
    ]


def rows_sha256(rows: Path) -> str:
    """The digest of rows that a card names, 64 hex digits.

    Of a file it is SHA-256 over its bytes. Of a folder it is SHA-256 over a line for each of its data files in name
    order: the file's digest, two blanks, its path in the folder, and a zero byte, as ``sha256sum -z`` prints them.

    Raises:
        LichenError: if a file cannot be read, or a folder holds none.
    """
    if not rows.is_dir():
        return _sha256(rows)
    lines = [digest.encode() + b"  " + os.fsencode(name) + b"\0" for name, _, digest in file_digests(rows)]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def file_digests(rows: Path) -> Iterator[tuple[str, int, str]]:
    """``(path below the folder, bytes, SHA-256)`` of each data file, in name order."""
    files = data_files(rows)
    names = {file.relative_to(rows).as_posix() if rows.is_dir() else file.name: file for file in files}
    for name in sorted(names):
        yield name, names[name].stat().st_size, _sha256(names[name])


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    try:
        data_files(file)  # a pipe would never end
        with open(file, "rb") as source:
            while piece := source.read(_PIECE):
                found.update(piece)
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror or error}", where=str(file), fix="check the file") from None
    return found.hexdigest()
