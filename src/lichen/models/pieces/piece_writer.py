"""A piece of a language model that writes: it goes on from the keys and values of the tokens that it has seen.

It holds what the piece was trained to beside the bare piece, around the same weights. Each line of text has a cache of
its own; whoever asks says how many tokens have gone through before.

Legend: T new tokens, H width, V tokens of a vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.wrap import Wrapped, wrap
from lichen.models.loading.load import frozen_eval
from lichen.models.loading.span import span_of
from lichen.models.packed_cohort import base_of
from lichen.models.renamed import cache_argument, cache_of

__all__ = ["PieceWriter"]


@final
class PieceWriter:
    """One piece, asked for the next token of one text at a time, bare or tuned.

    Args:
        piece: From :func:`lichen.models.pieces.load_piece.load_piece`, of a language model.
        spec: What of it was trained, from :func:`lichen.models.pieces.carve.spec_within`; perhaps nothing.
        learned: What the whole model has learned; the other pieces' tensors are passed over.

    Raises:
        LichenError: if the piece's class takes no keys and values of earlier tokens.
    """

    def __init__(self, piece: Any, spec: Spec, learned: Shared) -> None:
        span = span_of(piece)
        assert span is not None
        frozen_eval(piece)
        self._piece, self._span = piece, span
        self._wrapped: Wrapped = wrap(piece, spec, bare=True)
        mine = self._wrapped.init(0)
        self._learned_C: Tree = {name: learned.trainable[name][None] for name in mine if name in learned.trainable}
        layers = {*self._wrapped.layers, *self._wrapped.patch_only}
        self._fixed: Tree = {f"patch.{n}": x for n, x in learned.patch.items() if n.rpartition(".")[0] in layers}
        signature = inspect.signature(piece.base_model.forward)
        cache = cache_argument(signature)
        if cache is None:
            raise LichenError(f"a {type(piece).__name__} keeps no keys and values", where="model.name")
        self._cache, self._positions = cache, "position_ids" in signature.parameters
        self._past: dict[bool, tuple[Any, int]] = {}

    def step(self, entry: Tensor, known: int, *, tuned: bool) -> Tensor:
        """What the piece makes of new tokens: ``(1, T, H)`` hidden states, of the last piece ``(1, 1, V)`` logits.

        Args:
            entry: Tokens ``(1, T)`` for the first piece, hidden states ``(1, T, H)`` for the others.
            known: Tokens of the text that have gone through before; 0 begins another text.
            tuned: With what was learned.

        Raises:
            LichenError: if other tokens have gone through than ``known`` says.
        """
        from transformers import DynamicCache

        past, seen = self._past.pop(tuned, (None, 0)) if known else (None, 0)
        if seen != known:
            raise LichenError(f"{seen} tokens of the text have gone through here, not {known}", where="host")
        past = DynamicCache(config=self._piece.config) if past is None else past
        count = known + entry.shape[1]
        named: dict[str, Any] = {"input_ids" if self._span.first else "inputs_embeds": entry, "use_cache": True}
        named |= {self._cache: past, "attention_mask": torch.ones(1, count, dtype=torch.int64)}
        named |= {"position_ids": torch.arange(known, count)[None]} if self._positions else {}
        with torch.no_grad():
            out = self._through(named, tuned=tuned)
        self._past[tuned] = cache_of(out), count
        hidden: Tensor = out[0]
        return hidden

    def _through(self, named: dict[str, Any], *, tuned: bool) -> Any:
        part = "" if self._span.last else base_of(self._wrapped)
        named |= {"logits_to_keep": 1} if self._span.last else {}
        if tuned:
            return self._wrapped.call(self._learned_C, self._fixed, part=part, **named)
        return self._piece.get_submodule(part)(**named)
