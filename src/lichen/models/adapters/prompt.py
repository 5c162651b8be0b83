"""Prompt tuning: trained virtual tokens before every row, one set a client.

Where the model is causal, hidden states of the virtual tokens are cut off again where the stack ends, so that
labels and pooling keep their places. An encoder's classifier sees them: what it reads first, and pools, is the
first virtual token, as in PEFT.

References:
    Lester, Al-Rfou and Constant (2021). The Power of Scale for Parameter-Efficient Prompt Tuning.
    EMNLP 2021, arXiv:2104.08691.

Legend: C clients, N rows of all clients, T tokens, m virtual tokens, H width.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.adapters.kind import AdapterKind
from lichen.models.adapters.table import BUILT_IN
from lichen.models.adapters.virtual_peft import PROMPT_PEFT
from lichen.models.packing.packing import Packing
from lichen.models.renamed import cache_argument

__all__ = ["SOFT_PROMPT", "Prompt", "VirtualTokens", "arguments_of", "attended", "backbone", "draw_tokens"]

_POSITIONS = ("position_embeddings", "wpe", "embed_positions")


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualTokens(ABC):
    """How many virtual tokens.

    Attributes:
        tokens: Virtual tokens before every row, or before every layer's keys and values.
        heads: Ends of names of layers trained whole (PEFT's ``modules_to_save``).

    Raises:
        LichenError: for fewer than one token.
    """

    tokens: int = 16
    heads: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise LichenError(
                f"{self.tokens} tokens are below 1", where="model.adapter.num_virtual_tokens", fix="use 8 to 100"
            )

    @property
    @abstractmethod
    def kind(self) -> AdapterKind:
        """What is made of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt(VirtualTokens):
    """Virtual tokens before every row."""

    @property
    def kind(self) -> AdapterKind:
        """A soft prompt."""
        return SOFT_PROMPT


@final
class PromptTokens(nn.Module):
    """C clients' virtual tokens, which come in through ``functional_call``; without them the model is bare."""

    buffer_names = ("tokens",)
    padded_only = "a prompt stands before padded rows"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.empty(0), persistent=False)

    def forward(self, embeds_NTH: Tensor) -> Tensor:
        """``(N, T, H)`` to ``(N, m + T, H)``."""
        tokens_CmH = self.get_buffer("tokens")
        rows = embeds_NTH.shape[0] // tokens_CmH.shape[0]
        return torch.cat([tokens_CmH.repeat_interleave(rows, dim=0).to(embeds_NTH.dtype), embeds_NTH], dim=1)


def backbone(model: Any) -> Any:
    """The submodule whose forward every row goes through: the decoder where the output layer asks that directly."""
    base = model.base_model
    inner = getattr(base, "decoder", None)
    return inner if isinstance(inner, nn.Module) and not hasattr(base, "encoder") else base


def arguments_of(signature: inspect.Signature, inputs: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those that gather the rest among them."""
    given = dict(signature.bind(*inputs, **named).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def attended(model: Any, mask_NT: Tensor | None, rows: int, tokens: int, *, extra: int, device: Any) -> Tensor:
    """The attention mask ``(N, m + T)`` with the virtual tokens attended.

    Raises:
        LichenError: if the model has no positions for so many.
    """
    for name, layer in model.named_modules():
        most = layer.num_embeddings if isinstance(layer, nn.Embedding) else extra + tokens
        if name.rpartition(".")[2] in _POSITIONS and extra + tokens > most:
            raise LichenError(
                f"{extra} virtual tokens and {tokens} of a row are more than the model's {most} positions",
                where="model.adapter.num_virtual_tokens",
                fix="use fewer, or a smaller data.max_length",
            )
    if mask_NT is None:
        return torch.ones(rows, extra + tokens, dtype=torch.int64, device=device)
    return torch.cat([mask_NT.new_ones(rows, extra), mask_NT], dim=1)


def _is_causal(model: Any) -> bool:
    return any(getattr(layer, "is_causal", False) is True for layer in model.modules())


def place(model: Any, spec: Prompt, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put virtual tokens before the model's rows, and give the name of the place where they lie.

    Raises:
        LichenError: for an encoder with a decoder, which reads a row in two places.
    """
    if model.config.is_encoder_decoder:
        raise LichenError(
            f"a prompt stands before one stack of layers, and a {type(model).__name__} has two",
            where="model.adapter.kind",
            fix="use lora or ia3",
        )
    base = backbone(model)
    path = next(f"{name}.prompt".removeprefix(".") for name, layer in model.named_modules() if layer is base)
    prompt = PromptTokens()
    base.add_module("prompt", prompt)
    causal = _is_causal(base)
    outer = base if causal else model
    forward, signature = outer.forward, inspect.signature(outer.forward)
    cache_name = cache_argument(signature) or ""

    def prompted(*inputs: Any, **named: Any) -> Any:
        if not prompt.get_buffer("tokens").numel():
            return forward(*inputs, **named)
        given, extra = arguments_of(signature, inputs, named), prompt.get_buffer("tokens").shape[1]
        given.pop("cache_position", None)  # counted without the prompt; the model counts it anew from the cache
        ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        rows, width = embeds.shape[:2]
        cache = given.get(cache_name)
        known = 0 if cache is None else cache.get_seq_length()
        given["attention_mask"] = attended(
            model, given.get("attention_mask"), rows, max(known - extra, 0) + width, extra=extra, device=embeds.device
        )
        positions = given.get("position_ids")
        if known:  # a row is being written token by token: the prompt is in the cache
            if positions is not None:
                given["position_ids"] = positions + extra
            return forward(inputs_embeds=embeds, **given)
        if positions is not None:
            first = torch.arange(extra, device=positions.device).expand(positions.shape[0], extra)
            given["position_ids"] = torch.cat([first, positions + extra], dim=1)
        if given.get("token_type_ids") is not None:
            types = given["token_type_ids"]
            given["token_type_ids"] = torch.cat([types.new_zeros(rows, extra), types], dim=1)
        out = forward(inputs_embeds=prompt(embeds), **given)
        if causal:
            out.last_hidden_state = out.last_hidden_state[:, extra:]
        return out

    # transformers and we ask a forward for its arguments.
    prompted.__signature__ = signature  # type: ignore[attr-defined]
    outer.forward = prompted
    return (path,)


def draw_tokens(model: Any, count: int, *path: int | str, seed: int) -> Tensor:
    """``(1, count)`` tokens of the model's vocabulary."""
    words = model.config.get_text_config().vocab_size
    return torch.randint(words, (1, count), generator=torch_generator(seed, *path)).to(model.device)


def start(model: Any, path: str, spec: Prompt, seed: int) -> Tree:
    """The embeddings of words drawn from the vocabulary."""
    layer = model.get_input_embeddings()
    ids_1m = draw_tokens(model, spec.tokens, "prompt", path, seed=seed)
    # An embedding trained whole is empty between calls.
    embeds_mH = (layer.start["weight"][ids_1m] if hasattr(layer, "start") else layer(ids_1m))[0].detach()
    return {"tokens": embeds_mH.to(torch.promote_types(embeds_mH.dtype, torch.float32), copy=True)}


def build(section: Any, heads: tuple[str, ...]) -> Prompt:
    """From a recipe's section."""
    return Prompt(tokens=section.num_virtual_tokens, heads=heads)


SOFT_PROMPT = AdapterKind(
    facts=BUILT_IN["prompt"], build=build, place=place, start=start, tensors=PromptTokens.buffer_names, peft=PROMPT_PEFT
)
