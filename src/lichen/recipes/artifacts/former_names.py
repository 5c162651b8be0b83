"""Folders that were written before keys of a recipe were renamed: they become what they would be if made today.

Their recipe, and with it its digest, is written by old names. Both are put under the new ones in place, once, so that a
run goes on and what is finished counts as finished. Nothing else in them depends on the names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lichen.core.files.durable import rename_folder, write_atomic
from lichen.core.files.manifest import MANIFEST
from lichen.recipes.schema.read import former_sha256, recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe

__all__ = ["adopt_folder", "adopt_run"]


def adopt_run(folder: Path) -> None:
    """Put an unfinished or finished run under its recipe's new digest, if it bears the former one.

    Args:
        folder: A folder with a recipe.
    """
    recipe, digest_file = recipe_of(folder), folder / "state" / "recipe.sha256"
    former, new = former_sha256(recipe), recipe_sha256(recipe)
    if (
        former == new
        or not digest_file.is_file()
        or former not in (marks := digest_file.read_text(errors="replace").split())
    ):
        return
    # Whichever of the two files is written when a kill comes, the next call finds the folder and ends the work.
    write_atomic(folder / "recipe.yaml", write_recipe(recipe).encode())
    adopt_summary(folder / "summary.json", recipe)
    write_atomic(digest_file, "\n".join(new if one == former else one for one in marks).encode())


def adopt_summary(file: Path, recipe: Recipe) -> None:
    """Let a summary name its recipe by the new digest, if it names it by the former one.

    Args:
        file: The summary; it may be missing.
        recipe: What was run.
    """
    if not file.is_file():
        return
    text, former, new = file.read_bytes(), former_sha256(recipe).encode(), recipe_sha256(recipe).encode()
    if former != new and former in text:
        (file.parent / MANIFEST).unlink(missing_ok=True)
        write_atomic(file, text.replace(former, new))


def adopt_folder(old: Path, new: Path, recipes: Iterable[tuple[Path, Recipe]] = ()) -> None:
    """Give a folder that is called by a former digest its new name, and what it holds its new digests.

    Args:
        old: What it was called.
        new: What it is called.
        recipes: Runs inside it, each by its path within and its recipe.
    """
    if not old.is_dir() or new.exists():
        return
    for within, recipe in recipes:
        if (old / within / "recipe.yaml").is_file():
            adopt_run(old / within)
        adopt_summary(old / within / "summary.json", recipe)
    rename_folder(old, new)
