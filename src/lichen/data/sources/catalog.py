"""Looks up models and data sets by short name.

A catalog name is a convenience, not a limit: a hub id or a local folder does just as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.data.sources.convert import from_gguf
from lichen.data.sources.entries import CATALOG, Entry, cache_dir, near_names
from lichen.data.sources.fetch import fetch_entry, fetched

__all__ = ["CATALOG", "Entry", "cache_dir", "fetch_entry", "fetched", "looks_like_hub_id", "resolve_model"]


def looks_like_hub_id(name: str) -> bool:
    """Whether ``name`` has the form of a hub id: ``org/name``, or a bare name.

    >>> [looks_like_hub_id(n) for n in ("org/name", "gpt2", "./gpt2", "a/b/c", "data.csv")]
    [True, True, False, False, False]
    """
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    if Path(name).suffix.lower() in {".jsonl", ".json", ".csv", ".parquet", ".gguf", ".safetensors"}:
        return False
    return re.fullmatch(f"{part}(/{part})?", name) is not None


def resolve_model(name: str, *, say: Callable[[str], None] | None = None) -> str | Path:
    """Where to load a model from: a fetched catalog folder, a local folder, or a hub id passed through.

    A GGUF file, or a folder with nothing else to load, is read into a plain folder of the cache first.

    Args:
        name: A catalog name, a folder, a GGUF file, or a hub id such as ``org/name``.
        say: Called with a line of progress while a catalog entry is fetched, or a GGUF file is read.

    Raises:
        LichenError: if it is none of these, or names data.
    """
    if name in CATALOG:
        if CATALOG[name].kind != "model":
            raise LichenError(f"{name!r} is data", where="model.name", fix=f"models: {near_names('', 'model')}")
        return fetch_entry(name, say=say)
    folder = Path(name).expanduser()
    if folder.is_dir():
        bare = not (folder / "config.json").exists() and any(folder.glob("*.gguf"))
        return from_gguf(folder, say=say or _no_report) if bare else folder
    if folder.is_file():
        if folder.suffix.lower() == ".gguf":
            return from_gguf(folder, say=say or _no_report)
        raise LichenError(f"{name!r} is a file", where="model.name", fix="name the folder that holds config.json")
    if looks_like_hub_id(name):
        return name
    raise LichenError(
        f"no such model folder {name!r}",
        where="model.name",
        fix=f"give an existing folder, a hub id (org/name) or one of: {near_names(name, 'model')}",
    )


def _no_report(line: str) -> None:
    del line
