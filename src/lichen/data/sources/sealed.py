"""Digests of what lies in the cache: a folder there is used only while it is what was fetched or made."""

from __future__ import annotations

from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.files.manifest import check, files_in, seal, sealed

__all__ = ["check_entry", "has_digests", "is_whole", "seal_entry"]

_FILE = ".manifest.json"


def seal_entry(folder: Path, name: str) -> None:
    """Write down digests of all files in a folder that is going to have this name in the cache."""
    seal(folder, _FILE, files_in(folder, but=(_FILE,)), about=name, shared=True)


def has_digests(folder: Path) -> bool:
    """Whether there is anything to hold it against; earlier versions wrote no digests."""
    return sealed(folder, _FILE)


def check_entry(folder: Path, *, fix: str, quick: bool = True) -> None:
    """Hold a folder of the cache against its digests.

    Args:
        folder: The folder, under its name.
        fix: What mends it.
        quick: Read only what was changed since it was last read.

    Raises:
        LichenError: naming the file that is damaged, missing or too many.
    """
    check(folder, _FILE, fix=fix, about=folder.name, quick=quick, whole=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder that was made here is there, and is what was made."""
    try:
        check_entry(folder, fix="")
    except LichenError:
        return False
    return (folder / "config.json").exists()
