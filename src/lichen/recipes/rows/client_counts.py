"""Counts every client's rows by split, and how many are truncated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lichen.data.reading import lengths_of
from lichen.recipes.rows.prepare import ClientData, first_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["counts_of", "shared_test"]

MOST_COUNTED = 20_000
"""Rows in all whose tokens are counted once more; with more, nobody's cut rows are told."""


def shared_test(clients_data: Sequence[ClientData]) -> bool:
    """Whether several clients are scored on one common test set."""
    tests = [client_data.test for client_data in clients_data if client_data.test]  # one that is absent has none
    return len(tests) > 1 and len(set(first_of(tests))) == 1


def counts_of(
    recipe: Recipe, clients_data: Sequence[ClientData], tokenizer: Any = None
) -> tuple[dict[str, int | None], ...]:
    """``train``, ``valid``, ``test`` and ``cut`` of every client.

    Args:
        recipe: Its form and most tokens.
        clients_data: The clients.
        tokenizer: Counts tokens; None for rows without.

    Returns:
        ``cut`` is None where it is not known: without tokens, in a stream, which loses nothing, and of very many rows.
        A common test set is no client's own and is left out of it.
    """
    common = shared_test(clients_data)
    rows = [
        (*client_data.train, *client_data.valid, *(() if common else client_data.test)) for client_data in clients_data
    ]
    counted = tokenizer is not None and recipe.data.form != "stream" and sum(map(len, rows)) <= MOST_COUNTED
    out: list[dict[str, int | None]] = []
    for client_data, mine in zip(clients_data, rows, strict=True):
        cut: int | None = None
        if counted:
            form = recipe.data.form if recipe.writes else "classify"
            most, thinking = recipe.data.max_length, recipe.data.thinking
            lengths = lengths_of(mine, tokenizer, form=form, max_length=most, thinking=thinking)  # type: ignore[arg-type]
            cut = 0 if lengths is None else lengths.cut
        out.append(
            {
                "train": len(client_data.train),
                "valid": len(client_data.valid),
                "test": len(client_data.test),
                "cut": cut,
            }
        )
    return tuple(out)
