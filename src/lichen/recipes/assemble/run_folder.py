"""The run folder: atomic files, locks, and what is already done.

``recipe.yaml`` · ``roster.json`` · ``trace.jsonl`` · ``summary.json`` · ``curves.png`` · ``clients.png`` · ``adapter/``
or ``model/`` · ``state/`` (checkpoints of every column, private client state, scores already taken).

All of it is private, files of mode 0600 in folders of 0700, but ``adapter/``, ``merged/`` and ``model/``, which are
there to be handed on.

Of several ranks only the first writes here; what many ranks make and keep for later, such as their
clients' private state, is said where it is made. All ranks see one folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.roster import Roster
from lichen.core.rounds import load_state
from lichen.core.store import load_tree, save_tree, write_atomic
from lichen.core.tree import Tree
from lichen.engines.ranks import Ranks

__all__ = ["RunFolder", "save_roster"]


@final
class RunFolder:
    """Paths of one run and what it already knows.

    Args:
        path: The folder; made when missing.
        recipe_sha256: What the folder must belong to.
        ranks: Who works on it together; all of them make and ask the same things in the same order.

    Raises:
        LichenError: if it was made by another recipe.
    """

    def __init__(self, path: Path, *, recipe_sha256: str, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = path, ranks or Ranks()
        self._seconds_file = path / "state" / "seconds"
        self._before: float = self.ranks.ask_first(lambda: self._claim(recipe_sha256))
        self._start = time.monotonic()

    def _claim(self, recipe_sha256: str) -> float:
        """Mark the folder as the recipe's; the seconds spent on it before."""
        digest_file = self.path / "state" / "recipe.sha256"
        if digest_file.exists() and recipe_sha256 not in digest_file.read_text().split():
            raise LichenError(
                "was made by another recipe",
                where=str(self.path),
                fix="resume with the folder's own recipe, or choose another --out",
            )
        private.make_folders(digest_file.parent)
        with suppress(OSError):  # an older run's may be open to others
            digest_file.parent.chmod(private.FOLDER)
        write_atomic(digest_file, recipe_sha256.encode())
        return float(self._seconds_file.read_text()) if self._seconds_file.exists() else 0.0

    def seconds(self) -> float:
        """Wall time spent on this run so far, over all its sessions; remembered on disk."""
        total = self._before + time.monotonic() - self._start
        if self.ranks.first:
            write_atomic(self._seconds_file, f"{total:.3f}".encode())
        return total

    def checkpoint(self, column: str, grid: str) -> Path:
        """File of a column's server state, as the first rank has left it: all ranks meet here."""
        self.ranks.wait()
        return self.path / "state" / column / grid / "server.safetensors"

    def clients(self, column: str, grid: str) -> Path:
        """Folder of a column's private client state."""
        return self.path / "state" / column / grid / "clients"

    def finished(self) -> dict[tuple[str, str], int]:
        """Rounds on disk, by (column, grid)."""
        found = sorted((self.path / "state").glob("*/*/server.safetensors"))
        return {(f.parent.parent.name, f.parent.name): load_state(f).round for f in found}

    def tree(self, name: str, make: Callable[[], Tree], *, alone: bool = False) -> Tree:
        """A tree made once and read back ever after.

        Args:
            name: What it is called.
            make: Makes it, with all ranks together.
            alone: The first rank makes it by itself, and the others wait.
        """
        file = self._score(name)
        if self.ranks.ask_first(lambda: not file.exists()):
            made = make() if self.ranks.first or not alone else {}
            if self.ranks.first:
                save_tree(file, made)
            self.ranks.wait()
        return load_tree(file)[0]

    def trees(self, makes: Mapping[str, Callable[[], Tree]]) -> list[Tree]:
        """Trees of those names, each made once by one of the ranks, which take turns, and read back ever after."""
        missing: list[str] = self.ranks.ask_first(lambda: [name for name in makes if not self._score(name).exists()])
        for name in missing[self.ranks.rank :: self.ranks.size]:
            save_tree(self._score(name), makes[name]())
        self.ranks.wait()
        return [load_tree(self._score(name))[0] for name in makes]

    def _score(self, name: str) -> Path:
        return self.path / "state" / "scores" / f"{name}.safetensors"

    def number(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that the first rank makes once, read back ever after."""
        return self.tree(name, lambda: {"value": make()}, alone=True)["value"]

    def write_json(self, name: str, value: Any, *, shared: bool = False) -> Path:
        """Write JSON atomically, on the first rank; NaN is refused."""
        file = self.path / name
        if self.ranks.first:
            write_atomic(file, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode(), shared=shared)
        return file


def save_roster(folder: RunFolder, roster: Roster) -> None:
    """Write down who takes part, as each has declared itself."""
    folder.write_json("roster.json", roster.dump())
