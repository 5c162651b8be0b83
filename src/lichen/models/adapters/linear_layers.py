"""Finds the linear layers of a model, chooses those that a recipe names, and runs their frozen part.

Legend: i in, o out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lichen.core.errors import LichenError
from lichen.models.adapters.ends.end_blocks import blocks_of, end_blocks, end_prefixes, refuse_middle
from lichen.models.adapters.quantized import QuantizedLinear, QuantizedWeight, dense_weight, linear_frozen

__all__ = [
    "fits",
    "frozen_linear",
    "frozen_weight",
    "is_conv1d",
    "is_linear",
    "last_blocks",
    "oriented",
    "refuse_unknown",
    "target_layers",
]


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight lies the other way."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def is_linear(layer: nn.Module) -> bool:
    """Whether an adapter fits: ``nn.Linear``, quantised or not, or the transposed ``Conv1D`` of GPT-2."""
    return isinstance(layer, (nn.Linear, QuantizedLinear)) or is_conv1d(layer)


def oriented(layer: nn.Module, matrix_oi: Tensor) -> Tensor:
    """An (out, in) matrix as the layer's own weight lies."""
    return matrix_oi.t() if is_conv1d(layer) else matrix_oi


def frozen_weight(layer: Any) -> Tensor:
    """The (out, in) matrix of a wrapped layer that no client trains; made anew where it is quantised."""
    weight = dense_weight(layer.weight)
    return weight.t() if layer.transposed else weight


def frozen_linear(layer: Any, x: Tensor, bias_o: Tensor | None = None) -> Tensor:
    """``x W' + b`` of a wrapped layer's frozen part; a quantised weight is not kept dense for the way back."""
    if isinstance(layer.weight, QuantizedWeight):
        return linear_frozen(x, layer.weight.dense, bias_o)
    return nn.functional.linear(x, frozen_weight(layer), bias_o)


def all_linear(model: Any) -> tuple[str, ...]:
    """Every linear layer but the output layer and a classification head, as PEFT's ``all-linear``."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(
        name
        for name, layer in model.named_modules()
        if is_linear(layer) and layer is not output and name.split(".")[0] not in ("score", "classifier")
    )


def fits(name: str, ends: Sequence[str]) -> bool:
    """Whether a layer's name ends in one of these, at a dot.

    >>> fits("layers.0.mlp.up_proj", ("up_proj",)), fits("layers.0.mlp.up_proj", ("proj",))
    (True, False)
    """
    return any(name == end or name.endswith(f".{end}") for end in ends)


def refuse_unknown(ends: Sequence[str], found: Sequence[str], *, where: str) -> None:
    """Say so if one of ``ends`` fits none of the names found.

    Raises:
        LichenError: naming it, and what there is.
    """
    for end in ends:
        if not any(fits(name, (end,)) for name in found):
            known = sorted({name.rpartition(".")[2] for name in found})
            raise LichenError(f"no layer is called {end!r}", where=where, fix=f"use some of: {', '.join(known)}")


def last_blocks(model: Any, last: int | None) -> str | tuple[str, ...]:
    """How names in the last blocks of the model's stack begin.

    For None it is the empty beginning of all names; of an emulator, whose middle is frozen, those of its ends.

    Raises:
        LichenError: if the model has no such stack, or fewer blocks, or an emulator's last end has.
    """
    ends = end_blocks(model)
    if last is None:
        return "" if ends is None else end_prefixes(model)
    blocks = blocks_of(model)
    if not 1 <= last <= len(blocks):
        raise LichenError(f"the model has {len(blocks)} layers", where="model.adapter.last", fix="name as many at most")
    if ends is not None and last > ends[1]:
        raise LichenError(
            f"the last {last} blocks of an emulator reach into its middle, which stays as it is",
            where="model.adapter.last",
            fix=f"use {ends[1]} at most, or leave it out" if ends[1] else "leave it out",
        )
    return tuple(f"{name}." for name in blocks[-last:])


def target_layers(
    model: Any,
    targets: Sequence[str] | str,
    heads: Sequence[str],
    *,
    last: int | None,
    where: str = "adapter.target_modules",
) -> tuple[str, ...]:
    """The linear layers that ``targets`` mean, in the model's order, heads left out.

    Args:
        model: Untouched yet.
        targets: Ends of names, or ``"all-linear"``.
        heads: Full names of layers trained whole.
        last: Only in the last so many layers of the stack; None: in all.
        where: The key that errors name.

    Raises:
        LichenError: if an end fits no linear layer, or of an emulator none but in its middle.
    """
    if isinstance(targets, str):
        if targets != "all-linear":
            raise LichenError(f"{targets!r} is no list", where=where, fix="a list, or all-linear")
        chosen = all_linear(model)
    else:
        linear = [name for name, layer in model.named_modules() if is_linear(layer)]
        refuse_unknown(targets, linear, where=where)
        chosen = tuple(name for name in linear if fits(name, targets))
    above = last_blocks(model, last)
    inside = tuple(name for name in chosen if name not in heads and name.startswith(above))
    if not isinstance(targets, str):
        for end in targets:  # one that fits nothing outside the middle was meant for it
            if end_blocks(model) is not None and not any(fits(name, (end,)) for name in inside):
                refuse_middle(model, [name for name in chosen if fits(name, (end,))], where=where)
    return inside
