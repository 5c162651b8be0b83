"""Computes frozen encoder features of rows, as shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lichen.data.batches.shards import ArrayShard
from lichen.data.batches.text import encode_classify
from lichen.data.sources.catalog import resolve_model
from lichen.data.sources.records import Record
from lichen.models.features import EncoderFeatures
from lichen.models.loading.load import load_encoder
from lichen.recipes.schema.recipe import Recipe

__all__ = ["encoder_of", "featurizer"]

BATCH_ROWS = 32
"""Rows that go through the encoder at once where their bits need not be independent."""


def encoder_of(recipe: Recipe, name: str, *, exact: bool) -> tuple[EncoderFeatures, Any]:
    """``(features, tokenizer)`` of a frozen encoder, features of length one.

    Args:
        recipe: Names the device.
        name: The encoder.
        exact: Each row by itself, so that its bits depend on nothing but its own tokens; three times slower.
    """
    model, tokenizer = load_encoder(resolve_model(name), device=recipe.model.device)
    return EncoderFeatures(model, normalize=True, reference=exact), tokenizer


def featurizer(
    recipe: Recipe, features: EncoderFeatures, tokenizer: Any, classes: Sequence[str]
) -> Callable[[Sequence[Record]], ArrayShard]:
    """How rows become frozen features."""
    device = features.model.device

    def make(records: Sequence[Record]) -> ArrayShard:
        rows = encode_classify(records, tokenizer, max_length=recipe.data.max_length, classes=tuple(classes))
        out = torch.zeros(len(rows), features.width)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        for at in range(0, len(order), BATCH_ROWS):
            some = order[at : at + BATCH_ROWS]
            ids = torch.zeros(len(some), len(rows[some[-1]][0]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for r, i in enumerate(some):
                tokens = torch.from_numpy(rows[i][0])
                ids[r, : len(tokens)], mask[r, : len(tokens)] = tokens, 1
            out[some] = features.rows(ids.to(device), mask.to(device)).cpu()
        return ArrayShard(x=out.numpy(), labels=np.asarray([label for _, label in rows], dtype=np.int64))

    return make
