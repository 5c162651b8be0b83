"""Cuts a model into pieces: consecutive blocks as a model of their own, around the same weights.

A piece is a transformers model like the whole one, so that whatever trains the whole trains a piece. The first has
the embeddings, the last what follows the stack and the head; the others take hidden states and give hidden states.
Masks, positions and rotary tables are made anew in each piece from the rows' lengths, and never sent. Tensors have
the names that they have in the whole model: the sixth block is ``layers.5`` in every piece, and so a piece's adapter
begins with the same numbers, and is that part of the whole's by name.

References:
    Otkrist Gupta and Ramesh Raskar. "Distributed learning of deep neural network over multiple agents." Journal of
    Network and Computer Applications, 2018. https://arxiv.org/abs/1810.06060
    Praneeth Vepakomma, Otkrist Gupta, Tristan Swedish and Ramesh Raskar. "Split learning for health: Distributed deep
    learning without sharing raw patient data." 2018. https://arxiv.org/abs/1812.00564

Legend: N rows, T tokens, H width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.linear_layers import fits, refuse_unknown, target_layers
from lichen.models.adapters.lora import Lora
from lichen.models.loading.initial import keep_blocks
from lichen.models.loading.span import Span, note_span
from lichen.models.pieces.families import blocks_of, family_of

__all__ = ["carve", "spec_within"]


@final
class HiddenStates(nn.Module):
    """Stands where the embeddings are: what comes in has gone through them elsewhere."""

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, *others: Any, **named: Any
    ) -> Tensor:
        """Hidden states as they are.

        Raises:
            LichenError: for tokens.
        """
        del others, named
        if inputs_embeds is None or input_ids is not None:
            raise LichenError("this piece takes hidden states, not tokens", where="batch", fix="run the pieces before")
        return inputs_embeds


@final
class NoPositions(nn.Module):
    """Stands where learned positions are looked up: they have been added elsewhere.

    What is added here is -0.0, the one number that leaves every other as it is.
    """

    def forward(self, position_ids: Tensor) -> Tensor:
        """One number, whatever the positions."""
        return torch.tensor(-0.0, device=position_ids.device)


def check_span(start: int, stop: int, blocks: int, *, where: str) -> Span:
    """Blocks ``start`` to ``stop`` of so many.

    Raises:
        LichenError: if these are not there, or none.
    """
    span = Span(start=start, stop=stop, blocks=blocks)
    if not 0 <= start < stop <= blocks:
        raise LichenError(f"blocks {span} of a model with {blocks}", where=where, fix="name blocks that there are")
    return span


def carve(model: Any, start: int, stop: int, *, where: str = "model.name") -> Any:
    """Blocks ``start`` to ``stop`` of a model, as a model of their own.

    Args:
        model: A loaded Llama, Qwen2, GPT-2 (language models), BERT or DistilBERT (classifiers); it stays as it is, and
            the piece shares its weights. Quantised layers stay so.
        start: The first block; 0: with the embeddings before it.
        stop: The block after the last; where there is none: with the norm and the head after it.
        where: The key that errors name.

    Returns:
        A model of the same class. Unless it is the first piece it takes ``inputs_embeds``, the hidden states of the
        piece before; unless it is the last its ``base_model`` gives hidden states, and it has no head.

    Raises:
        LichenError: if the family has no pieces, or the blocks are not there.
    """
    family = family_of(model.config)
    path, stack = blocks_of(model)
    span = check_span(start, stop, len(stack), where=where)
    twin = _structure(model)
    config = copy.deepcopy(model.config)
    keep_blocks(config, start, stop)
    for layer in twin.modules():
        if getattr(layer, "config", None) is not None:
            layer.config = config
    blocks = list(twin.get_submodule(path))[start:stop]
    part = nn.ModuleList()
    for number, block in enumerate(blocks, start):
        part.add_module(str(number), block)
        for layer in block.modules():  # where a cache of keys and values has its own
            if getattr(layer, "layer_idx", None) is not None:
                layer.layer_idx = number - start
    twin.set_submodule(path, part)
    base = twin.base_model
    if not span.first:
        base.set_submodule(family.embeddings, HiddenStates())
        if family.positions:
            base.set_submodule(family.positions, NoPositions())
    if not span.last:
        if family.after == "pooler":
            base.pooler = None
        elif family.after:
            base.set_submodule(family.after, nn.Identity())
        for name, layer in list(twin.named_children()):
            if layer is not base:
                twin.set_submodule(name, nn.Identity())
    note_span(twin, span)
    return twin.eval()


def _structure(model: Any) -> Any:
    """The same modules around the same tensors."""
    shared: dict[int, Any] = {id(x): x for x in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def spec_within(spec: Spec, model: Any, piece: Any) -> Spec:
    """What of a piece is trained, where ``spec`` says what of the whole model is.

    Args:
        spec: LoRA, and layers trained whole.
        model: The whole model; its structure is enough.
        piece: A piece of it.

    Raises:
        LichenError: for another kind of adapter, for names that fit no layer of the whole, or if a matrix were trained
            that lies at both ends of the model.
    """
    if not isinstance(spec, Lora):
        raise LichenError(
            f"a {spec.kind.facts.word} adapter is not trained in pieces", where="model.adapter.kind", fix="use lora"
        )
    modules = [name for name, _ in model.named_modules() if name]
    refuse_unknown(spec.heads, modules, where="model.adapter.modules_to_save")
    heads = tuple(name for name in modules if fits(name, spec.heads))
    if trained := _tied(model, heads):
        raise LichenError(
            f"{trained} is one matrix with the other end of the model, and cannot be trained there and not here",
            where="model.adapter.modules_to_save",
            fix="leave it out",
        )
    inside = {name for name, layer in piece.named_modules() if not isinstance(layer, nn.Identity)}
    targets = target_layers(model, spec.targets, heads, last=spec.last) if spec.targets else ()
    mine = tuple(name for name in targets if name in inside and _has_weights(piece, name))
    return replace(spec, targets=mine, last=None, heads=tuple(name for name in heads if name in inside))


def _has_weights(piece: Any, name: str) -> bool:
    return next(piece.get_submodule(name).parameters(), None) is not None


def _tied(model: Any, heads: Sequence[str]) -> str:
    """The first of these layers that shares its matrix with the other end of a language model; empty: none does."""
    output = model.get_output_embeddings()
    ends = (output, model.get_input_embeddings())
    if output is None or ends[0].weight is not ends[1].weight:
        return ""
    names = {path for path, layer in model.named_modules() if any(layer is end for end in ends)}
    return next((head for head in heads if any(name == head or name.startswith(f"{head}.") for name in names)), "")
