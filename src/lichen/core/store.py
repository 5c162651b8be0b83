"""What must survive a kill: the server's state and the clients' private state, as safetensors, atomically.

Private state is versioned. A round that trains version v stages its result as v + 1; loading for
version v takes the newest file not above v. A killed round therefore leaves nothing to undo: its
staged files are newer than the server's version and are overwritten when the round is repeated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from lichen.core import tree as trees
from lichen.core.contracts import ServerState
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["ClientStore", "load_state", "load_tree", "save_state", "save_tree", "write_atomic"]


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that a reader, or a kill at any moment, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save_tree(path: Path, tree: Tree, header: dict[str, Any] | None = None) -> None:
    """Write a tree and a small JSON header atomically; equal trees give equal bytes."""
    write_atomic(path, save(trees.plain(tree), metadata={"lichen": json.dumps(header or {}, sort_keys=True)}))


def load_tree(path: Path) -> tuple[Tree, dict[str, Any]]:
    """Undo :func:`save_tree`.

    Raises:
        LichenError: if the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lichen", "{}"))
        return load_file(path), header
    except FileNotFoundError:
        raise LichenError("no such file", where=str(path)) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LichenError(
            f"is damaged: {error}", where=str(path), fix="delete it and run again without --resume"
        ) from None


def save_state(path: Path, state: ServerState) -> None:
    """Write the server's state atomically."""
    tree: Tree = {}
    for part in ("shared", "optimizer", "best"):
        tree = trees.join(f"{part}/", getattr(state, part), tree)
    tree["best_value"] = torch.tensor(state.best_value, dtype=torch.float64)
    save_tree(path, tree, {"round": state.round, "best_round": state.best_round})


def load_state(path: Path) -> ServerState:
    """Undo :func:`save_state`.

    Raises:
        LichenError: if the file is missing, damaged or not a server state.
    """
    tree, header = load_tree(path)
    try:
        value = float(tree.pop("best_value"))
        shared, tree = trees.split(tree, "shared/")
        optimizer, tree = trees.split(tree, "optimizer/")
        best, _ = trees.split(tree, "best/")
        return ServerState(
            round=int(header["round"]),
            shared=shared,
            optimizer=optimizer,
            best=best,
            best_round=int(header["best_round"]),
            best_value=value,
        )
    except KeyError as error:
        raise LichenError(f"is not a server state: {error} is missing", where=str(path)) from None


class ClientStore:
    """Private state of many clients in a folder, one small file a client and version.

    Args:
        folder: Where the files lie; made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _versions(self, client: int) -> list[int]:
        home = self.folder / str(client)
        return sorted(int(f.stem) for f in home.glob("[0-9]*.safetensors")) if home.is_dir() else []

    def load(self, clients: Sequence[int], version: int) -> Tree | None:
        """Stacked private state of these clients at ``version``; None if none of them has any.

        Raises:
            LichenError: if only some of them have state, so that they cannot stack.
        """
        newest = [max((v for v in self._versions(c) if v <= version), default=None) for c in clients]
        if all(v is None for v in newest):
            return None
        if any(v is None for v in newest):
            missing = [c for c, v in zip(clients, newest, strict=True) if v is None]
            raise LichenError(
                f"clients {missing[:4]} have no private state beside others that do", where=str(self.folder)
            )
        return trees.stack(
            [load_tree(self.folder / str(c) / f"{v}.safetensors")[0] for c, v in zip(clients, newest, strict=True)]
        )

    def stage(self, clients: Sequence[int], version: int, own_C: Tree) -> None:
        """Write the state these clients will have at ``version``.

        What a server that acknowledges at least every second version may still ask for is kept: the
        newest state not above ``version - 2`` and all after it.
        """
        for position, client in enumerate(clients):
            home = self.folder / str(client)
            save_tree(home / f"{version}.safetensors", trees.take(own_C, position))
            versions = self._versions(client)
            needed = max((v for v in versions if v <= version - 2), default=0)
            for old in versions:
                if old < needed:
                    (home / f"{old}.safetensors").unlink()
