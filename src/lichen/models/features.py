"""Sentence features of a frozen encoder: mean pooling over attended tokens.

Alone, each row goes through the encoder by itself with its padding cut off, so that its bits depend
on nothing but its own tokens: neither on the batch it came in nor on the width it was padded to.
Statistics summed from such features are the same for any split of the rows.

References:
    Reimers and Gurevych (2019). Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks.
    EMNLP-IJCNLP 2019, arXiv:1908.10084.

Legend: C clients, B rows of a batch, N rows, T tokens, H width.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch
from lichen.models.loading.load import base_digest, frozen_eval

__all__ = ["EncoderFeatures"]


@final
class EncoderFeatures:
    """Mean-pooled features of an encoder; call it with a batch, or :meth:`rows` with plain tokens.

    Args:
        model: From :func:`lichen.models.loading.load.load_encoder`.
        normalize: Scale every row to length one.
        reference: One row at a time, exact whatever its company; None: on a CPU yes, elsewhere no.
    """

    __slots__ = ("base", "model", "normalize", "reference")

    def __init__(self, model: Any, *, normalize: bool = False, reference: bool | None = None) -> None:
        frozen_eval(model)
        self.model, self.normalize = model, normalize
        self.base = base_digest(model)
        self.reference = model.device.type == "cpu" if reference is None else reference

    @property
    def width(self) -> int:
        """H, the number of features of a row."""
        return int(self.model.config.hidden_size)

    def __call__(self, batch: Batch) -> Tensor:
        """Features (C, B, H) of ``input_ids_CBT`` under ``attention_mask_CBT``, float32."""
        clients, rows, _ = batch["input_ids_CBT"].shape
        ids_NT, mask_NT = (
            batch[name].flatten(0, 1).to(self.model.device) for name in ("input_ids_CBT", "attention_mask_CBT")
        )
        return self.rows(ids_NT, mask_NT).reshape(clients, rows, -1)

    @torch.no_grad()
    def rows(self, input_ids_NT: Tensor, attention_mask_NT: Tensor) -> Tensor:
        """Features (N, H) of token rows, float32; a row without any attended token gives zeros."""
        if not self.reference:
            return self._pool(input_ids_NT, attention_mask_NT)
        features = []
        for ids_T, mask_T in zip(input_ids_NT, attention_mask_NT, strict=True):
            attended = mask_T.bool()
            if not bool(attended.any()):
                features.append(torch.zeros(1, self.width, device=ids_T.device))
                continue
            end = int(attended.nonzero()[-1]) + 1
            features.append(self._pool(ids_T[None, :end], mask_T[None, :end]))
        return torch.cat(features) if features else torch.zeros(0, self.width)

    def _pool(self, ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        hidden_NTH = self.model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state.float()
        weight_NT1 = mask_NT[..., None].float()
        mean_NH = torch.where(mask_NT[..., None] > 0, hidden_NTH, 0.0).sum(1) / weight_NT1.sum(1).clamp(min=1)
        return nn.functional.normalize(mean_NH, dim=-1) if self.normalize else mean_NH
