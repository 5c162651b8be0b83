"""Prefix tuning: trained keys and values before every layer's own, one set a client.

Every token attends to m virtual ones in every layer; hidden states and labels keep their places, and positions
count on from m. The paper trains the prefix through a small network and throws that away afterwards; here the
prefix itself is trained, from the keys and values of real words, which the paper found the best start. A causal
model thus begins as if those words stood before every row.

References:
    Li and Liang (2021). Prefix-Tuning: Optimizing Continuous Prompts for Generation. ACL 2021,
    arXiv:2101.00190.

Legend: C clients, N rows of all clients, T tokens, m virtual tokens, L layers, k key and value heads, d width of
a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.func import functional_call

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, split
from lichen.models.adapters.ends.end_blocks import end_blocks
from lichen.models.adapters.kind import AdapterKind
from lichen.models.adapters.prompt import VirtualTokens, arguments_of, attended, backbone, draw_tokens
from lichen.models.adapters.table import BUILT_IN
from lichen.models.adapters.virtual_peft import PREFIX_PEFT
from lichen.models.packing.packing import Packing
from lichen.models.renamed import cache_argument

__all__ = ["PREFIX_TUNING", "Prefix"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix(VirtualTokens):
    """Virtual tokens before every layer's keys and values."""

    @property
    def kind(self) -> AdapterKind:
        """A prefix of keys and values."""
        return PREFIX_TUNING


@final
class PrefixTokens(nn.Module):
    """C clients' keys and values, which come in through ``functional_call``; without them the model is bare."""

    buffer_names = ("keys", "values")
    padded_only = "a prefix stands before padded rows"

    def __init__(self) -> None:
        super().__init__()
        for name in self.buffer_names:
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, cache: Any, rows: int, dtype: torch.dtype) -> Any:
        """An empty cache of transformers, with the keys and values put into it for every row."""
        keys_CLkmd, values_CLkmd = (self.get_buffer(name) for name in self.buffer_names)
        each = rows // keys_CLkmd.shape[0]
        layers = zip(keys_CLkmd.unbind(1), values_CLkmd.unbind(1), strict=True)
        for number, (keys_Ckmd, values_Ckmd) in enumerate(layers):
            keys_Nkmd, values_Nkmd = (x.repeat_interleave(each, dim=0).to(dtype) for x in (keys_Ckmd, values_Ckmd))
            cache.update(keys_Nkmd, values_Nkmd, number)
        return cache


def place(model: Any, spec: Prefix, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """Put a prefix before the model's keys and values, and give the name of the place where it lies.

    Raises:
        LichenError: if the model takes no keys and values from outside, or is an emulator.
    """
    from transformers import DynamicCache

    if end_blocks(model) is not None:
        raise LichenError(
            "a prefix stands before every block, and the middle of an emulator stays as it is",
            where="model.adapter.kind",
            fix="use lora, ia3, prompt, bitfit or full",
        )
    base = backbone(model)
    path = next(f"{name}.prefix".removeprefix(".") for name, layer in model.named_modules() if layer is base)
    forward, signature = base.forward, inspect.signature(base.forward)
    cache_name = cache_argument(signature)
    if cache_name is None:
        raise LichenError(
            f"a {type(base).__name__} takes no keys and values from outside",
            where="model.adapter",
            fix="use prompt or lora",
        )
    prefix = PrefixTokens()
    base.add_module("prefix", prefix)

    def prefixed(*inputs: Any, **named: Any) -> Any:
        keys = prefix.get_buffer("keys")
        if not keys.numel():
            return forward(*inputs, **named)
        given, extra = arguments_of(signature, inputs, named), keys.shape[3]
        given.pop("cache_position", None)  # counted without the prefix; the model counts it anew from the cache
        first = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        rows, width = first.shape[:2]
        cache = DynamicCache(config=base.config) if given.get(cache_name) is None else given[cache_name]
        known = cache.get_seq_length()  # the prefix among it, where a row is being written token by token
        given[cache_name] = cache if known else prefix(cache, rows, base.dtype)
        given["attention_mask"] = attended(
            base, given.get("attention_mask"), rows, max(known - extra, 0) + width, extra=extra, device=first.device
        )
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + extra
        return forward(**given)

    # transformers and we ask a forward for its arguments.
    prefixed.__signature__ = signature  # type: ignore[attr-defined]
    base.forward = prefixed
    return (path,)


def start(model: Any, path: str, spec: Prefix, seed: int) -> Tree:
    """The keys and values that the frozen model makes of words drawn from its vocabulary."""
    from transformers import DynamicCache

    part = path.removesuffix("prefix").removesuffix(".")
    # What is trained whole is empty between calls.
    heads: Tree = {
        f"{name}.{leaf}": x[None]
        for name, layer in model.named_modules()
        if hasattr(layer, "start")
        for leaf, x in layer.start.items()
    }
    cache = DynamicCache(config=model.base_model.config)
    ids_1m = draw_tokens(model, spec.tokens, "prefix", path, seed=seed)
    name = cache_argument(inspect.signature(model.get_submodule(part).forward))
    assert name is not None  # place() has refused others
    inputs = {"input_ids": ids_1m, "attention_mask": torch.ones_like(ids_1m), name: cache}
    with torch.no_grad():
        inside = split(heads, f"{part}.")[0] if part else heads
        functional_call(model.get_submodule(part), inside, kwargs=inputs, tie_weights=False)
    found: Tree = {}
    for name in PrefixTokens.buffer_names:
        x_Lkmd = torch.stack([getattr(layer, name)[0] for layer in cache.layers])
        found[name] = x_Lkmd.to(torch.promote_types(x_Lkmd.dtype, torch.float32), copy=True)
    return found


def build(section: Any, heads: tuple[str, ...]) -> Prefix:
    """From a recipe's section."""
    return Prefix(tokens=section.num_virtual_tokens, heads=heads)


PREFIX_TUNING = AdapterKind(
    facts=BUILT_IN["prefix"], build=build, place=place, start=start, tensors=PrefixTokens.buffer_names, peft=PREFIX_PEFT
)
