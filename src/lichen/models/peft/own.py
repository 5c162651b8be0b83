"""Writes a client's own model in PEFT's format; of two adapters that are weighed row by row both.

PEFT weighs adapters alike in all rows, so that a pair whose weight differs is two folders, and the numbers that weigh
them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lichen.core.files.durable import write_atomic
from lichen.core.private import make_folders
from lichen.core.store import save_tree
from lichen.core.tree import Tree
from lichen.models.adapters.kind import Spec
from lichen.models.peft.format import save_adapter

__all__ = ["write_own"]

_TWO = """Two adapters of one base stand here side by side, `own` and `other`. How much each counts differs by row or by
token: `weights.safetensors` has the centre of own rows (FedDPA) or the gates of the layers (FedALT). PEFT weighs
adapters alike in all rows: it loads each of them, not their mixture. Lichen's guide says how they are weighed.
"""


class _Own(Protocol):
    @property
    def trainable(self) -> Tree: ...
    @property
    def other(self) -> Tree: ...
    @property
    def weights(self) -> Tree: ...


def write_own(draft: Path, own: _Own, *, spec: Spec, base_name: str, task: str, patch: Tree) -> tuple[Path, ...]:
    """Write an own model in PEFT's format; of two adapters that are weighed row by row both, and what weighs them.

    Args:
        draft: A folder.
        own: The model.
        spec: What the run trained.
        base_name: Folder or hub id of the base.
        task: PEFT's name of the task.
        patch: The run's patch.

    Returns:
        The folders of adapters.

    Raises:
        LichenError: if PEFT has no such adapter.
    """
    parts = {"own": own.trainable, "other": own.other} if own.other else {".": own.trainable}
    for part, tree in parts.items():
        whole = {**{name: x for name, x in own.trainable.items() if name not in tree}, **tree}
        make_folders(draft / part)
        save_adapter(draft / part, whole, spec=spec, base_name=base_name, task=task, patch=patch)
    if own.other:
        save_tree(draft / "weights.safetensors", own.weights)
        write_atomic(draft / "README.md", _TWO.encode())
    return tuple(draft / part for part in parts)
