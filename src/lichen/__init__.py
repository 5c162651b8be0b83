"""Lichen: federated learning and foundation models, each making the other better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LichenError", "Recipe", "Result", "export", "read_recipe", "run", "talk"]

if TYPE_CHECKING:
    from lichen.core.errors import LichenError
    from lichen.recipes.run import Result, export, run, talk
    from lichen.recipes.schema.read import read_recipe
    from lichen.recipes.schema.recipe import Recipe

_HOMES = {
    "LichenError": "lichen.core.errors",
    "Recipe": "lichen.recipes.schema.recipe",
    "Result": "lichen.recipes.run",
    "export": "lichen.recipes.run",
    "read_recipe": "lichen.recipes.schema.read",
    "run": "lichen.recipes.run",
    "talk": "lichen.recipes.run",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that ``import lichen`` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lichen' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
