"""What clients are asked for values to first order: the gradient of their rows, and under masks their own value."""

from __future__ import annotations

from pathlib import Path

from lichen.clients.evaluation.gradient import Gradient
from lichen.clients.evaluation.own_value import OwnValue, Remembering
from lichen.clients.evaluation.value_notes import ValueNotes
from lichen.clients.masking.masked import Masked
from lichen.core.contracts.client import ClientWork, Dialogue
from lichen.core.contracts.model import CohortModel
from lichen.present.trace import lr_name
from lichen.recipes.assemble.sides.masks import mask_terms
from lichen.recipes.schema.recipe import Recipe
from lichen.server.sums.summed import Weighting
from lichen.server.value.first_order import GRADIENTS

__all__ = ["GRADIENT", "OWN_VALUE", "remembering", "value_works", "values_itself"]

GRADIENT, OWN_VALUE = "gradient", "value"
"""The works' names; that of values is followed by the learning rate."""

OWN_VALUES = "own_values"
"""Folder in a site's state, and in that of a run whose clients are all here: values that only their clients know."""


def values_itself(recipe: Recipe) -> bool:
    """Whether each client finds its own value, since the server sees no single message."""
    return recipe.value is not None and recipe.masked is not None


def value_works(
    recipe: Recipe, model: CohortModel, judges: int, weighting: Weighting, state: Path | None
) -> dict[str, ClientWork | Dialogue]:
    """What values to first order ask of clients, by name; nothing for other kinds.

    Under masks a gradient comes as a sum of gradients and of nothing else: a sum of losses beside the one of validation
    would, where other clients are in it, tell of those who are missing.

    Args:
        recipe: The recipe.
        model: The cohort model.
        judges: Clients that are asked for a gradient.
        weighting: How a round's mean weighs clients.
        state: Where clients keep what is theirs; None: nowhere.
    """
    value, out = recipe.value, dict[str, ClientWork | Dialogue]()
    if value is None or value.kind != "first":
        return out
    masked = recipe.masked is not None
    if value.rows == "valid":
        gradient, terms = Gradient(model, with_loss=not masked), mask_terms(recipe, judges) if masked else None
        out[GRADIENT] = gradient if terms is None else Masked(inner=gradient, terms=terms, aggregator=GRADIENTS)
    for rate in map(lr_name, recipe.optimizer.lr if masked else ()):
        notes = None if state is None else ValueNotes(state / OWN_VALUES / rate)
        out[f"{OWN_VALUE} {rate}"] = OwnValue(model.group, notes, weighting=weighting)
    return out


def remembering(recipe: Recipe, work: ClientWork) -> ClientWork:
    """Training whose clients keep what they send, where each finds its own value of it."""
    if recipe.value is None or not values_itself(recipe):
        return work
    return Remembering(work, every=recipe.value.every)
