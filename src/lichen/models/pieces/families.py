"""Where the parts of an architecture lie: its stack of blocks, what comes before it, and what after.

Legend: H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from lichen.core.errors import LichenError

__all__ = ["FAMILIES", "Family", "family_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Names inside the base model of one architecture, the one that gives hidden states.

    Attributes:
        stack: The list of blocks.
        embeddings: What makes hidden states of tokens, before the stack.
        positions: What else is added to them before the stack; empty: nothing.
        after: What comes after the stack; empty: nothing.
        causal: It is a language model; else a classifier.
    """

    stack: str
    embeddings: str
    positions: str = ""
    after: str = ""
    causal: bool


FAMILIES: Mapping[str, Family] = {
    "llama": Family(stack="layers", embeddings="embed_tokens", after="norm", causal=True),
    "qwen2": Family(stack="layers", embeddings="embed_tokens", after="norm", causal=True),
    "gpt2": Family(stack="h", embeddings="wte", positions="wpe", after="ln_f", causal=True),
    "bert": Family(stack="encoder.layer", embeddings="embeddings", after="pooler", causal=False),
    "distilbert": Family(stack="transformer.layer", embeddings="embeddings", causal=False),
}
"""By ``model_type``. What is not here may scale its embeddings, or share a table among its blocks."""


def family_of(config: Any, *, where: str = "model.name") -> Family:
    """The family of a model's configuration.

    Raises:
        LichenError: if it has none.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise LichenError(
            f"a {config.model_type} cannot be cut into pieces", where=where, fix=f"use one of: {', '.join(FAMILIES)}"
        )
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise LichenError(
            f"a {config.model_type} whose blocks differ by their number cannot be cut into pieces",
            where=where,
            fix="use one without scale_attn_by_inverse_layer_idx",
        )
    return family


def blocks_of(model: Any) -> tuple[str, nn.ModuleList]:
    """``(name, blocks)``: the stack of a model of one of the families, by its full name.

    Raises:
        LichenError: if the model is of none, or not for the family's task.
    """
    family, base = family_of(model.config), model.base_model
    if base is model or (model.get_output_embeddings() is not None) != family.causal:
        raise LichenError(
            f"a {type(model).__name__} cannot be cut into pieces",
            where="model.name",
            fix=f"a {model.config.model_type} can for task: {'chat' if family.causal else 'classify'}",
        )
    stack: nn.ModuleList = base.get_submodule(family.stack)
    return f"{model.base_model_prefix}.{family.stack}", stack
