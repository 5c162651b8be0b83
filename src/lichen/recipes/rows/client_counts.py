"""Counts every client's rows by split, and how many are truncated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lichen.data.reading import lengths_of
from lichen.recipes.rows.prepare import Owner, first_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["MOST_COUNTED", "counts_of", "shared_test"]

MOST_COUNTED = 20_000
"""Rows in all whose tokens are counted once more; with more, nobody's cut rows are told."""


def shared_test(owners: Sequence[Owner]) -> bool:
    """Whether several clients are scored on one common test set."""
    return len(owners) > 1 and len(set(first_of([owner.test for owner in owners]))) == 1


def counts_of(recipe: Recipe, owners: Sequence[Owner], tokenizer: Any = None) -> tuple[dict[str, int | None], ...]:
    """``train``, ``valid``, ``test`` and ``cut`` of every client.

    Args:
        recipe: Its form and most tokens.
        owners: The clients.
        tokenizer: Counts tokens; None for rows without.

    Returns:
        ``cut`` is None where it is not known: without tokens, in a stream, which loses nothing, and of very many rows.
        A common test set is no client's own and is left out of it.
    """
    common = shared_test(owners)
    rows = [(*owner.train, *owner.valid, *(() if common else owner.test)) for owner in owners]
    counted = tokenizer is not None and recipe.data.form != "stream" and sum(map(len, rows)) <= MOST_COUNTED
    out: list[dict[str, int | None]] = []
    for owner, mine in zip(owners, rows, strict=True):
        cut: int | None = None
        if counted:
            form = "classify" if recipe.task != "chat" else recipe.data.form
            most, thinking = recipe.data.max_length, recipe.data.thinking
            lengths = lengths_of(mine, tokenizer, form=form, max_length=most, thinking=thinking)  # type: ignore[arg-type]
            cut = 0 if lengths is None else lengths.cut
        out.append({"train": len(owner.train), "valid": len(owner.valid), "test": len(owner.test), "cut": cut})
    return tuple(out)
