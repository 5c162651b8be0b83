"""A local encoder behind the interface: texts in, normalised vectors out.

The vector is the mean of the last hidden states over a text's tokens, the special ones of an encoder
included, as sentence encoders are trained to be read.

References:
    Nils Reimers and Iryna Gurevych. "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks."
    EMNLP-IJCNLP 2019. https://arxiv.org/abs/1908.10084

Legend: N texts, T tokens, H width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.interface import Usage
from lichen.models.features import EncoderFeatures

__all__ = ["LocalEncoder"]


@final
class LocalEncoder:
    """A frozen encoder and its tokenizer, asked by text (an :class:`lichen.fm.interface.Embedder`).

    Args:
        model: From :func:`lichen.models.loading.load.load_encoder`.
        tokenizer: Its tokenizer.
        name: How it is called; the model's own name if empty.
        batch: Texts in one call of the model.
        longest: Tokens of a text that are read, the special ones included; what is longer is cut off.
        reference: One text at a time, so that a vector's bits depend on its own text alone; slower.

    Raises:
        LichenError: if the model is not frozen, or nothing of a text would be read.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str = "",
        batch: int = 32,
        longest: int = 256,
        reference: bool = False,
    ) -> None:
        self._features = EncoderFeatures(model, normalize=True, reference=reference)
        self.name = name or str(getattr(model.config, "name_or_path", "")) or type(model).__name__
        self.batch = batch
        self.longest = min(longest, int(getattr(model.config, "max_position_embeddings", longest)))
        if self.longest < 1 or batch < 1:
            raise LichenError("reads nothing of a text", where="longest", fix="use longest and batch of 1 or more")
        self._tokenizer = tokenizer
        self._usage = Usage()

    @property
    def usage(self) -> Usage:
        """What it was asked so far."""
        return self._usage

    @property
    def source(self) -> str:
        """The digest of the weights, and how much of a text is read."""
        return f"sha256:{self._features.base}/{self.longest}"

    @property
    def width(self) -> int:
        """H."""
        return self._features.width

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, H)`` float32, rows of length one; a text without tokens gives zeros."""
        rows = [self._tokenizer(text, truncation=True, max_length=self.longest)["input_ids"] for text in texts]
        order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
        pad, device = int(self._tokenizer.pad_token_id), self._features.model.device
        out_NH = torch.zeros(len(rows), self.width)
        for at in range(0, len(order), self.batch):
            some = order[at : at + self.batch]
            wide = max(1, len(rows[some[-1]]))
            ids_NT = torch.tensor([[*rows[n], *[pad] * (wide - len(rows[n]))] for n in some], device=device)
            mask_NT = torch.tensor([[1] * len(rows[n]) + [0] * (wide - len(rows[n])) for n in some], device=device)
            out_NH[some] = self._features.rows(ids_NT, mask_NT).cpu()
            self._usage += Usage(calls=1, tokens_in=int(mask_NT.sum()))
        return out_NH
