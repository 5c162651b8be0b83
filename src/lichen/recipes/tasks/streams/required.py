"""Says what a stream needs of its recipe and the names of its periods, before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.models.adapters.table import kind_object
from lichen.recipes.schema.recipe import Recipe

__all__ = ["require_adapter", "require_names"]


def require_adapter(recipe: Recipe) -> None:
    """Refuse an adapter from which no period could go on.

    Raises:
        LichenError: if PEFT has no form of it.
    """
    kind = recipe.model.adapter.kind
    if kind_object(kind).peft is None:
        raise LichenError(
            f"{kind} has no form in which the next period could begin from it",
            where="model.adapter.kind",
            fix="use lora, or another kind that PEFT has",
        )


def require_names(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse keys of periods that are not there.

    Args:
        recipe: Of a stream.
        names: Of the periods in which somebody has enough rows.

    Raises:
        LichenError: if there is none, nothing to replay, or no period before another base.
    """
    stream = recipe.stream
    assert stream is not None
    if not names:
        raise LichenError("no client has enough rows in any period", where="data.min_rows", fix="lower it")
    if len(names) == 1 and stream.replay:
        raise LichenError("there is one period, and nothing before it", where="stream.replay", fix="remove it")
    rebase = stream.rebase
    if rebase is None:
        return
    if rebase.period not in names:
        raise LichenError(
            f"has no rows of {rebase.period!r} that anybody trains on",
            where="stream.rebase.period",
            fix=f"use one of: {listed(names[1:], near=rebase.period)}" if names[1:] else "remove stream.rebase",
        )
    if rebase.period == names[0]:
        raise LichenError(
            f"nothing comes before {rebase.period}, the first period, that was on another base",
            where="stream.rebase.period",
            fix=f"remove stream.rebase, and set model.name: {rebase.model}",
        )
