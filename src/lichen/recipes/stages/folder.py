"""Finds the runs in a folder of several stages; the folder of an ordinary run stands for itself."""

from __future__ import annotations

import re
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST
from lichen.recipes.stages.read import Staged, page_of

__all__ = ["last_stage", "stage_done", "staged_of"]


def staged_of(folder: Path) -> Staged | None:
    """The stages of a folder; None where it is no such folder.

    Raises:
        LichenError: if its recipe is damaged.
    """
    file = folder / "recipe.yaml"
    if not file.is_file() or not re.search(rb"^stages:", file.read_bytes(), re.MULTILINE):
        return None
    found = page_of(folder)
    return found if isinstance(found, Staged) else None


def stage_done(folder: Path) -> bool:
    """Whether a run is finished: its manifest is written last of all."""
    return (folder / "summary.json").is_file() and (folder / MANIFEST).is_file()


def last_stage(folder: Path | str) -> Path:
    """The run that a folder means: the last stage where there are several, else itself.

    Raises:
        LichenError: if it is a file, or that stage is not finished.
    """
    folder = Path(folder)
    if folder.is_file():
        raise LichenError("is a file", where=str(folder), fix="name the folder of a run")
    staged = staged_of(folder)
    if staged is None:
        return folder
    for stage in staged.stages:
        if not stage_done(folder / stage.folder):
            raise LichenError(
                f"stage {stage.name} of {len(staged.stages)} is not finished",
                where=str(folder),
                fix=f"go on with: lichen run --resume {folder}, or name the folder of a stage that is",
            )
    return folder / staged.stages[-1].folder
