"""Stores the class names of a run in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.recipes.assemble.run_folder import RunFolder

__all__ = ["class_names", "save_class_names"]

_FILE = "classes.json"
_OTHERS = ("model/config.json",)
"""Where runs of students and of task oneshot name their classes, too."""


def save_class_names(folder: RunFolder, classes: Sequence[str]) -> None:
    """Write the names in class order; nothing for a language model, which has none."""
    if classes:
        folder.write_json(_FILE, list(classes))


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of a run's classes, in the order of its logits.

    Args:
        folder: A run folder.

    Returns:
        The names; none for a language model, and for a folder that was written before names were kept.

    Raises:
        LichenError: if the file with the names is damaged.
    """
    for name in (_FILE, *_OTHERS):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        names = found.get("classes") if isinstance(found, dict) else found
        if isinstance(found, dict) and not names:  # a language model's
            continue
        if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
            raise LichenError("holds no list of class names", where=str(file), fix="run the recipe again")
        return tuple(names)
    return ()
