"""Runs over a tiny Llama whose clients have models of their own, and what lies in their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lichen
from lichen.core.store import ClientStore, load_tree
from lichen.core.tree import Tree, split
from lichen.present.clients import read_clients
from support.tiny_llama import recipe, save_model, save_rows


def save_home(folder: Path, *, clients: int) -> Path:
    """A model and what so many people wrote."""
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair", clients=clients)
    return folder


def made(home: Path, personal: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """A recipe over them, with the section ``personal`` where there is one; a call a client."""
    sections = {"engine": {"packing": False}, **more} | ({"personal": personal} if personal else {})
    return recipe(home / "model", home / "rows.jsonl", "pair", **sections)


def scores(result: lichen.Result, name: str) -> Tree:
    """The sums of a score."""
    return load_tree(result.folder / "state" / "scores" / f"{name}.safetensors")[0]


def kept(result: lichen.Result, column: str, version: int, prefix: str) -> Tree:
    """What all clients had of their own at a version."""
    store = ClientStore(next((result.folder / "state" / column).glob("*/clients")))
    own_C = store.load(range(len(read_clients(result.folder))), version)
    assert own_C is not None
    return split(own_C, prefix)[0]
