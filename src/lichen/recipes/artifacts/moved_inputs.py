"""Resumes a run whose data or model moved, if their digests are the same, or a stream that gets another base.

Everything else of a recipe is what the run is, and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import MANIFEST
from lichen.recipes.artifacts.distil.answers import ANSWERS
from lichen.recipes.schema.read import MOVABLE, different_keys, recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe

__all__ = ["move"]


def move(folder: Path, recipe: Recipe) -> Callable[[], None]:
    """Let a run's folder have this recipe, if it differs from the folder's own only in where things lie.

    A stream may also be given another base for a period that is to come.

    Args:
        folder: A folder with a recipe.
        recipe: What is to be gone on with.

    Returns:
        What gives the folder its own recipe back: for the case that something else lies there.

    Raises:
        LichenError: if the recipes differ in more.
    """
    own = recipe_of(folder)
    changed = different_keys(own, recipe)
    free = (*MOVABLE, "stream.rebase") if _base_is_to_come(folder, own, recipe) else MOVABLE
    if others := [key for key in changed if not any(f"{key}.".startswith(f"{one}.") for one in free)]:
        raise LichenError(
            f"was made by another recipe: {', '.join(others[:6])} {'differ' if len(others) > 1 else 'differs'}",
            where=str(folder),
            fix="resume with the folder's own recipe, or choose another --out; "
            f"only federation.rounds and {', '.join(MOVABLE)} may change",
        )
    if not changed:
        return lambda: None
    _give(folder, own, recipe)
    return lambda: _give(folder, recipe, own)


def _base_is_to_come(folder: Path, own: Recipe, recipe: Recipe) -> bool:
    """Whether a stream is given another base for a period that is not finished, and goes on none yet."""
    before, after = (None if one.stream is None else one.stream.rebase for one in (own, recipe))
    if own.stream is None or after is None or (folder / "periods" / after.period / MANIFEST).exists():
        return False
    return before is None or not (
        (folder / "periods" / before.period).exists() or (folder / "distilled" / ANSWERS).exists()
    )


def _give(folder: Path, before: Recipe, recipe: Recipe) -> None:
    digest_file = folder / "state" / "recipe.sha256"
    if digest_file.is_file() and recipe_sha256(before) in digest_file.read_text(errors="replace").split():
        write_atomic(digest_file, recipe_sha256(recipe).encode())
    write_atomic(folder / "recipe.yaml", write_recipe(recipe).encode())
