"""Finds the folder of a model that its owner has: in the catalog, on the disk, or fetched from a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lichen.data.sources.catalog import resolve_model
from lichen.models.loading.model_folder import plainly

__all__ = ["local_folder"]

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*")


def local_folder(name: str, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder that holds a model's files, whatever it is named by.

    Args:
        name: A catalog name, a folder, a GGUF file, or a hub id.
        say: Called with a line of progress where something is fetched.

    Raises:
        LichenError: if there is none, or the hub cannot be reached.
    """
    found = resolve_model(name, say=say)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    with plainly(f"cannot fetch {name}", where="MODEL", fix="give a folder, or a hub id that can be reached"):
        return Path(snapshot_download(found, allow_patterns=list(_FILES)))
