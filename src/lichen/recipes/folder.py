"""The run folder: where everything of one run lies, written so that a kill at any moment leaves it valid.

``recipe.yaml`` · ``trace.jsonl`` · ``summary.json`` · ``curves.png`` · ``clients.png`` · ``adapter/``
or ``model/`` · ``state/`` (checkpoints of every column, private client state, scores already taken).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.store import load_state, load_tree, save_tree, write_atomic
from lichen.core.tree import Tree

__all__ = ["RunFolder", "peak_memory_bytes"]


def peak_memory_bytes() -> int:
    """The most memory this process, or one it waited for, ever held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@final
class RunFolder:
    """Paths of one run and what it already knows.

    Args:
        path: The folder; made when missing.
        recipe_sha256: What the folder must belong to.

    Raises:
        LichenError: if it was made by another recipe.
    """

    def __init__(self, path: Path, *, recipe_sha256: str) -> None:
        self.path = path
        mark = path / "state" / "recipe.sha256"
        if mark.exists() and mark.read_text() != recipe_sha256:
            raise LichenError(
                "was made by another recipe",
                where=str(path),
                fix="resume with the folder's own recipe, or choose another --out",
            )
        write_atomic(mark, recipe_sha256.encode())
        self._clock = path / "state" / "seconds"
        self._before = float(self._clock.read_text()) if self._clock.exists() else 0.0
        self._start = time.monotonic()

    def seconds(self) -> float:
        """Wall time spent on this run so far, over all its sessions; remembered on disk."""
        total = self._before + time.monotonic() - self._start
        write_atomic(self._clock, f"{total:.3f}".encode())
        return total

    def checkpoint(self, column: str, grid: str) -> Path:
        """File of a column's server state."""
        return self.path / "state" / column / grid / "server.safetensors"

    def clients(self, column: str, grid: str) -> Path:
        """Folder of a column's private client state."""
        return self.path / "state" / column / grid / "clients"

    def finished(self) -> dict[tuple[str, str], int]:
        """Rounds on disk, by (column, grid)."""
        found = sorted((self.path / "state").glob("*/*/server.safetensors"))
        return {(f.parent.parent.name, f.parent.name): load_state(f).round for f in found}

    def tree(self, name: str, make: Callable[[], Tree]) -> Tree:
        """A tree made once and read back ever after."""
        file = self.path / "state" / "scores" / f"{name}.safetensors"
        if not file.exists():
            save_tree(file, make())
        return load_tree(file)[0]

    def number(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made once and read back ever after."""
        return self.tree(name, lambda: {"value": make()})["value"]

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON atomically; NaN is refused."""
        file = self.path / name
        write_atomic(file, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
        return file
