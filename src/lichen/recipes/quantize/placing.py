"""Puts a file or folder that has passed where it was asked for, and nothing where it has not."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lichen.core import private
from lichen.core.files.durable import PART, place_file, rename_folder

__all__ = ["draft_for", "place_draft"]


def draft_for(target: Path) -> tempfile.TemporaryDirectory[str]:
    """A private folder on the target's disk, which goes with all in it; no folder is made above it."""
    above = Path(os.path.abspath(target)).parent
    while not above.is_dir():
        above = above.parent
    return tempfile.TemporaryDirectory(dir=above, prefix=".export-", suffix=PART)


def place_draft(draft: Path, target: Path, *, shared: bool) -> None:
    """Give a draft its name; others may read it where it is ``shared``."""
    if draft.is_file():
        place_file(draft, target, shared=shared)
        return
    private.make_folders(target.parent, shared=shared)
    if shared:
        private.share(draft)
        draft.chmod(0o755)
    else:
        private.tighten(draft)
    rename_folder(draft, target, replace=True)
