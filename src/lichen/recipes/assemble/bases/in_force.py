"""Which base the model in a stream's folder was made on, where the stream has gone on another one."""

from __future__ import annotations

import json
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.recipes.schema.recipe import Recipe

__all__ = ["PERIODS", "on_base", "require_model", "with_base_in_force"]

PERIODS = "periods.json"
"""The periods of a stream, who was there, and the matrix."""


def on_base(recipe: Recipe, base: str) -> Recipe:
    """The recipe on another base."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": base})})


def with_base_in_force(recipe: Recipe, folder: Path) -> Recipe:
    """A run's recipe, on the base that the model in its folder was made on.

    Args:
        recipe: The folder's.
        folder: A finished run's.

    Raises:
        LichenError: if a stream's list of periods cannot be read.
    """
    if not recipe.streams or recipe.stream is None or recipe.stream.rebase is None:
        return recipe
    file = folder / PERIODS
    try:
        new = bool(json.loads(file.read_text(encoding="utf-8"))["on_new_base"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise LichenError(
            "does not say which base is in force", where=str(file), fix=f"make it again: lichen run --resume {folder}"
        ) from None
    return on_base(recipe, recipe.stream.rebase.model) if new else recipe


def require_model(folder: Path) -> None:
    """Refuse a stream of which no period's model was accepted: it ends where it began, with the bare base.

    Args:
        folder: A finished run's.

    Raises:
        LichenError: naming the folder of a period.
    """
    if (folder / PERIODS).is_file() and not (folder / "state" / "final.safetensors").exists():
        raise LichenError(
            "every period was rolled back, so that the base is in force as it came",
            where=str(folder),
            fix=f"name a period's folder below {folder / 'periods'}, or see {PERIODS} for why each was",
        )
