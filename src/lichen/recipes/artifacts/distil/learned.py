"""Makes the recipe of the run in which an adapter of a new base learns what the old model answers: at the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lichen.recipes.schema.recipe import Recipe

__all__ = ["learning"]

_OF_CLIENTS = (
    "teacher",
    "synthetic",
    "semi",
    "privacy",
    "attack",
    "value",
    "personal",
    "fingerprint",
    "audit",
    "stream",
)
"""Sections that say what goes on among clients, of which there are none at the server."""


def learning(values: Mapping[str, Any], recipe: Recipe, answers: Path) -> dict[str, Any]:
    """The keys of the recipe that learns the answers: one owner, in the form of the old rows, four passes.

    Args:
        values: The old recipe's keys that are not their defaults, already on the new base.
        recipe: The old recipe.
        answers: The rows that the old model writes.
    """
    first = {key: value for key, value in values.items() if key not in _OF_CLIENTS}
    optimizer = {key: value for key, value in values.get("optimizer", {}).items() if key in ("name", "lr")}
    engine = {key: value for key, value in values.get("engine", {}).items() if key not in ("name", "nodes", "clock")}
    return {
        **first,
        "data": _answered(recipe, answers),
        "compare": {"baselines": []},
        "optimizer": optimizer,
        "federation": {"rounds": 4, "local_epochs": 1, "batch_size": 4},
        "engine": engine,
    }


def _answered(recipe: Recipe, answers: Path) -> dict[str, Any]:
    data = recipe.data.model_dump(mode="json", exclude_defaults=True)
    own: dict[str, Any] = {key: data[key] for key in ("max_length", "system", "template", "thinking") if key in data}
    own["form"] = "chat" if recipe.data.form == "messages" else recipe.data.form
    columns = {"client": "client", "prompt": "prompt", "completion": "completion"}
    return {**own, "name": str(answers.absolute()), "columns": columns, "valid": 0.1, "test": 0.1}
