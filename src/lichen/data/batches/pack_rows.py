"""Packs a client's texts into rows of equal length, for pre-training.

Every row is full, so no step pays for padding, and every token but a row's first is learned. An end
token stands after each text, so that the model learns where one ends; a row may hold the end of one
text and the beginning of the next. What is left after the last full row is dropped.

References:
    Tom B. Brown et al. "Language Models are Few-Shot Learners." NeurIPS 2020.
    https://arxiv.org/abs/2005.14165 (documents packed into full contexts, with end tokens between)

Legend: N rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.batches.rows import Ragged, TextShard

__all__ = ["lm_rows"]

_ABREAST = 256
"""Texts tokenized in one call."""


def lm_rows(texts: Iterable[str], tokenizer: Any, length: int) -> TextShard:
    """One client's texts as rows of exactly ``length`` tokens, each its own label.

    Args:
        texts: In the order they are to be read; empty ones are skipped.
        tokenizer: A transformers tokenizer. Its end token, where it has one, follows each text.
        length: T, at least 2.

    Returns:
        A shard of kind ``lm``; without a row where the texts have fewer than T tokens together.

    Raises:
        LichenError: if rows of that length have nothing to predict.
    """
    if length < 2:
        raise LichenError(
            f"rows of {length} tokens have nothing to predict", where="data.max_length", fix="use at least 2"
        )
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    nonempty = [text for text in texts if text]
    parts: list[np.ndarray] = []
    for at in range(0, len(nonempty), _ABREAST):
        encoded = tokenizer(
            nonempty[at : at + _ABREAST], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        parts += [np.array([*ids, *end], dtype=np.int32) for ids in encoded["input_ids"]]
    stream = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    rows = len(stream) // length
    # One array for both: nothing of a shard is ever written to.
    packed = Ragged(stream[: rows * length].copy(), np.arange(rows + 1, dtype=np.int64) * length)
    return TextShard(packed, labels=packed, kind="lm")
