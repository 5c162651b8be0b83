"""What the server of a split run could read of its rows, for its summary."""

from __future__ import annotations

from collections.abc import Sequence

from lichen.audit.crossing import blocks_below, read_crossing, recovery_sentence, some_rows
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.data.batches.shards import Shard
from lichen.models.cohort import Cohort
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.transforms.activations import parse_activation_code

__all__ = ["crossing_numbers"]

ROWS, KNOWN = 64, 8_192
"""Test rows that are read, and tokens that the reader makes up."""


def crossing_numbers(server: ServerSide, tests: Sequence[Shard], shared: Shared) -> dict[str, float | str | None]:
    """The share of tokens that can be read at the lowest cut, and a sentence that says so; nothing where none is split.

    Args:
        server: The run's.
        tests: Test rows of each client.
        shared: What it has learned.
    """
    split, parts, model = server.recipe.split, server.split, innermost(server.model)
    rows = some_rows(tests, ROWS)
    if split is None or parts is None or not isinstance(model, Cohort) or not rows:
        return {}
    cut = min(one.first for one in parts.cuts)
    found = read_crossing(
        blocks_below(model, shared, cut),
        rows,
        model.wrapped.model.get_input_embeddings().weight.detach().float().cpu(),
        code=parse_activation_code(split.code).first_sent,
        noise=split.noise,
        seed=server.recipe.seed,
        known=KNOWN,
    )
    return {"split.tokens read": found.linear, "split.seen": recovery_sentence(cut, found)}
