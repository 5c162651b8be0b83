"""Checks rows of classifiers that pool at the end token, such as T5 and BART.

Legend: N rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["with_one_end"]


def with_one_end(config: Any, *, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """The inputs of a classifier, with rows of padding made rows of one end token where it reads rows there.

    Such a model refuses a batch whose rows hold unequal numbers of end tokens.

    Args:
        config: The model's.
        input_ids: ``(N, T)`` int64.
        attention_mask: ``(N, T)``.

    Raises:
        LichenError: if a text holds the end token, or the tokenizer puts none.
    """
    end, pad = getattr(config, "eos_token_id", None), getattr(config, "pad_token_id", None)
    if not config.is_encoder_decoder or not isinstance(end, int) or pad is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    real_N = ((input_ids != pad) & attention_mask.bool()).any(1)
    count_N = (input_ids == end).sum(1)[real_N]
    if bool((count_N != 1).any()):
        raise LichenError(
            f"a row holds the end token {int(count_N[count_N != 1][0])} times, and this model reads a row at its one",
            where="data.columns.text",
            fix="take the end token out of the texts, or use a model such as BERT",
        )
    first_NT = ~real_N[:, None] & (torch.arange(input_ids.shape[1], device=input_ids.device) == 0)
    return {
        "input_ids": torch.where(first_NT, end, input_ids),
        "attention_mask": torch.where(first_NT, 1, attention_mask),
    }
