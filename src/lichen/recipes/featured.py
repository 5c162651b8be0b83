"""Frozen features of an encoder as shards, for the tasks that learn a head on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lichen.data.catalog import resolve_model
from lichen.data.records import Record
from lichen.data.shards import ArrayShard
from lichen.data.text import encode_classify
from lichen.models.features import EncoderFeatures
from lichen.models.load import load_encoder
from lichen.recipes.schema import Recipe

__all__ = ["encoder_of", "featured"]


def featured(
    recipe: Recipe, features: EncoderFeatures, tokenizer: Any, classes: Sequence[str]
) -> Callable[[Sequence[Record]], ArrayShard]:
    """How rows become frozen features."""

    def make(records: Sequence[Record]) -> ArrayShard:
        rows = encode_classify(records, tokenizer, max_length=recipe.data.max_length, classes=tuple(classes))
        device = features.model.device
        ids = [torch.from_numpy(row).long()[None].to(device) for row, _ in rows]
        x = [features.rows(row, torch.ones_like(row)).cpu() for row in ids]
        return ArrayShard(x=torch.cat(x).numpy(), labels=np.asarray([label for _, label in rows], dtype=np.int64))

    return make


def encoder_of(recipe: Recipe, name: str) -> tuple[EncoderFeatures, Any]:
    """``(features, tokenizer)`` of a frozen encoder, features of length one."""
    model, tokenizer = load_encoder(resolve_model(name), device=recipe.model.device)
    return EncoderFeatures(model, normalize=True), tokenizer
