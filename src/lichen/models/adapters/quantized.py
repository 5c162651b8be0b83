"""Frozen linear layers in 8 or 4 bits, dequantised for one product at a time.

Adapters train beside weights that never change, so these need no precision for small steps: int8 with a
scale a row, or NF4 (the sixteen quantiles of a normal distribution) with a scale for each 64 weights. A
layer makes its weight dense on the way forward, throws it away, and makes it dense again on the way back;
autograd keeps codes only. Embeddings, norms, output layers and heads stay as they are. The codes come from
the CPU kernels of bitsandbytes wherever the model will lie, so that nodes with and without an accelerator
hold the same bytes.

References:
    Tim Dettmers, Artidoro Pagnoni, Ari Holtzman and Luke Zettlemoyer. "QLoRA: Efficient Finetuning of
    Quantized LLMs." NeurIPS 2023. https://arxiv.org/abs/2305.14314 (NF4, adapters on a quantised base)
    Tim Dettmers, Mike Lewis, Younes Belkada and Luke Zettlemoyer. "LLM.int8(): 8-bit Matrix Multiplication
    for Transformers at Scale." NeurIPS 2022. https://arxiv.org/abs/2208.07339 (a scale a row)

Legend: i in, o out, N weights of a layer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lichen.core.errors import LichenError

__all__ = [
    "KINDS",
    "Kind",
    "QuantizedLinear",
    "QuantizedWeight",
    "dense_weight",
    "import_peft",
    "is_quantized",
    "linear_frozen",
    "quantize",
    "quiet_import",
    "refuse_quantized",
    "resident_bytes",
    "weights_of",
]

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")

BLOCK = 64
"""Weights that share a scale in NF4, as QLoRA has it."""


@contextmanager
def quiet_import() -> Iterator[None]:
    """On some processors bitsandbytes asks a hub for one more kernel as it is imported; not in here."""
    hidden, log = "kernels" not in sys.modules, logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        if hidden:
            del sys.modules["kernels"]


def import_peft() -> Any:
    """PEFT, which imports bitsandbytes where that is installed, without a word to any hub; the one way to it."""
    with quiet_import():
        import peft
    return peft


def _library() -> Any:
    """``bitsandbytes.functional``.

    Raises:
        LichenError: if it is not installed.
    """
    with quiet_import():
        try:
            import bitsandbytes.functional as functional
        except ImportError:
            raise LichenError(
                "quantised weights need the library bitsandbytes, which is not installed",
                where="model.quantize",
                fix="pip install 'lichen[quantized]', or leave the key out",
            ) from None
    return functional


@final
class QuantizedWeight(nn.Module):
    """An (out, in) matrix as codes and scales; stands where a layer's ``weight`` stood.

    Args:
        weight_oi: The matrix; it is read once and not kept.
        kind: ``"int8"`` (8 bits a weight and 32 a row) or ``"nf4"`` (4 bits and 32 for each 64 weights).

    Attributes:
        kind: As given.
        shape: ``(out, in)``.
        dtype: Of what :meth:`dense` gives; follows ``model.to(dtype)``, while codes and scales stay.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, weight_oi: Tensor, kind: Kind) -> None:
        super().__init__()
        library = _library()
        self.kind: Kind = kind
        self.shape, self.dtype = weight_oi.shape, weight_oi.dtype
        back_to, source = weight_oi.device, weight_oi.detach().to("cpu", torch.float32).contiguous()
        if kind == "int8":
            codes, scales, _ = library.int8_vectorwise_quant(source)
        else:
            # In rows of one block: where rows of a matrix end within blocks, bitsandbytes 0.50 misreads them on a CPU.
            flat_N = nn.functional.pad(source.flatten(), (0, -source.numel() % BLOCK))
            codes, state = library.quantize_4bit(flat_N.view(-1, BLOCK), blocksize=BLOCK, quant_type="nf4")
            scales = state.absmax
        self.register_buffer("codes", codes.to(back_to))
        self.register_buffer("scales", scales.to(back_to))

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    def numel(self) -> int:
        """N."""
        return self.shape.numel()

    def dense(self) -> Tensor:
        """``(out, in)``: the matrix, made anew at every call."""
        library = _library()
        exact = self.dtype if self.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        if self.kind == "int8":
            weight_oi: Tensor = library.int8_vectorwise_dequant(self.codes, self.scales)
        else:
            shape = torch.Size((self.scales.numel(), BLOCK))
            state = library.QuantState(absmax=self.scales, shape=shape, dtype=exact, blocksize=BLOCK, quant_type="nf4")
            flat_N = library.dequantize_4bit(self.codes, state).view(-1)
            weight_oi = flat_N[: self.numel()].view(self.shape)
        return weight_oi.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Follow the model to a device; a change of its dtype changes what is made of the codes, not the scales."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.codes, self.scales = self.codes.to(probe.device), self.scales.to(probe.device)
        self.dtype = probe.dtype
        return self


@final
class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[], Tensor], bias_o: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight(), bias_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.weight(), None, None


def linear_frozen(x: Tensor, weight: Callable[[], Tensor], bias_o: Tensor | None = None) -> Tensor:
    """``x W' + b`` for a frozen W that is made for this product alone; only ``x`` gets a gradient.

    Args:
        x: ``(..., in)``.
        weight: Gives the ``(out, in)`` matrix, here and once more on the way back; nothing is kept between.
        bias_o: The frozen bias.
    """
    y: Tensor = _Frozen.apply(x, weight, bias_o)  # type: ignore[no-untyped-call]
    return y


def dense_weight(weight: Tensor | QuantizedWeight) -> Tensor:
    """``(out, in)``: the weight itself, or what its codes stand for."""
    return weight if isinstance(weight, Tensor) else weight.dense()


@final
class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is quantised.

    Args:
        weight: Its matrix.
        bias_o: Its bias.
    """

    def __init__(self, weight: QuantizedWeight, bias_o: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None = bias_o
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return linear_frozen(x, self.weight.dense, self.bias)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model is."""
    return any(isinstance(layer, QuantizedWeight) for layer in model.modules())


def refuse_quantized(model: nn.Module, *, where: str) -> None:
    """Refuse what needs the weights themselves.

    Raises:
        LichenError: if any layer is quantised.
    """
    if is_quantized(model):
        raise LichenError(
            "the base is quantised, and what is added to its weights would be lost in their few bits",
            where=where,
            fix="load the base at float32 (leave model.quantize out)",
        )


def quantize(model: Any, kind: Kind, *, dtype: torch.dtype | None = None) -> Any:
    """Quantise the linear layers of a model's transformer blocks, one after the other, in place.

    Each dense weight is let go before the next is read, so that little more is held than at the start.

    Args:
        model: A frozen transformers model, on the CPU for the same bytes everywhere.
        kind: ``"int8"`` or ``"nf4"``.
        dtype: Of everything that stays and of the products; None: as the model is.

    Returns:
        The model.

    Raises:
        LichenError: for another kind, without bitsandbytes, or if the model has no blocks to quantise.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.pytorch_utils import Conv1D

    if kind not in KINDS:
        raise LichenError(f"no weights of kind {kind!r}", where="model.quantize", fix=f"use {' or '.join(KINDS)}")
    blocks = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    found = {
        id(layer): (parent, name, layer)
        for block in blocks
        for parent in block.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear or isinstance(layer, Conv1D)
    }
    if not found:
        raise LichenError("the model has no transformer blocks with linear layers", where="model.quantize")
    remaining = [found.pop(key) for key in tuple(found)]
    while remaining:
        parent, name, layer = remaining.pop()
        weight_oi = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        setattr(parent, name, QuantizedLinear(QuantizedWeight(weight_oi, kind), layer.bias).eval())
        del layer.weight  # whoever still names the layer holds no matrix
    return model if dtype is None else model.to(dtype)


def _resident(model: nn.Module) -> dict[int, Tensor]:
    every = (*model.parameters(), *model.buffers())
    return {x.untyped_storage().data_ptr(): x for x in every if x.numel()}


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, each storage once."""
    return sum(x.untyped_storage().nbytes() for x in _resident(model).values())


def weights_of(model: nn.Module) -> dict[str, int]:
    """Numbers of weights by parameter name, a quantised matrix counted by the weights it stands for.

    >>> weights_of(nn.Linear(3, 2))
    {'weight': 6, 'bias': 2}
    """
    counted = {name: x.numel() for name, x in model.named_parameters()}
    packed = {name: layer.numel() for name, layer in model.named_modules() if isinstance(layer, QuantizedWeight)}
    return {**counted, **packed}
