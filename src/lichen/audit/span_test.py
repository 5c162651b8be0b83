"""Text from gradients: which tokens a client trained on, read off the change of the first attention layer.

The gradient of a linear layer's weight is a sum over tokens of (what came back) times (what went in), so its rows lie
in the span of the layer's inputs. At the first attention layer an input depends on a token and its place alone, so a
server can try every token of the vocabulary: those whose input lies in the span were in the batch. Plain steps of SGD
keep the span. LoRA's A factor has it too, once B is not zero; B's has that of A x, and in a first round both are
known. It must fail where the inputs are as many as the layer is wide, or for
LoRA as its rank: then the span is no longer theirs. Noise fills it at once.

References:
    Ivo Petrov, Dimitar I. Dimitrov, Maximilian Baader, Mark Niklas Müller and Martin Vechev. "DAGER: Exact Gradient
    Inversion for Large Language Models." NeurIPS 2024. https://arxiv.org/abs/2405.15586

Legend: V tokens of the vocabulary, T places, H width of the layer's input, o its output, r rank, k of the span.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = ["Probe", "Span", "found_in", "is_placed", "layer_inputs", "reads_tokens", "span_of", "tokens_in"]

TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding: changes come in single precision."""

NEAR = 0.01
"""Sine of the angle to the span below which an input lies in it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """What a change of a layer says of its inputs.

    Attributes:
        basis_kH: An orthonormal basis of the rows of the change, float32.
        most: The largest dimension it can have: the width, or LoRA's rank.
    """

    basis_kH: Tensor
    most: int

    @property
    def is_full(self) -> bool:
        """Whether the bound is reached, so that the span need not be that of the inputs and nothing can be read."""
        return self.basis_kH.shape[0] >= self.most


def span_of(change_oH: Tensor) -> Span:
    """The span of a change ``(o, H)`` of a weight, ``(r, H)`` of LoRA's A factor, or ``(o, r)`` of its B factor.

    Raises:
        LichenError: if it is no matrix of finite numbers.
    """
    if change_oH.dim() != 2 or not bool(change_oH.isfinite().all()):
        raise LichenError(f"a change of shape {tuple(change_oH.shape)} spans nothing", where="audit")
    _, size_k, basis_kH = torch.linalg.svd(change_oH.double().cpu(), full_matrices=False)
    count = int((size_k > TOLERANCE * size_k[0]).sum()) if float(size_k[0]) > 0 else 0
    return Span(basis_kH=basis_kH[:count].float(), most=min(change_oH.shape))


def tokens_in(span: Span, inputs_VH: Tensor, *, near: float = NEAR) -> Tensor:
    """bool ``(V,)``: whose input lies in the span; none where the span is full or empty."""
    if span.is_full or not span.basis_kH.shape[0]:
        return torch.zeros(len(inputs_VH), dtype=torch.bool)
    unit_VH = torch.nn.functional.normalize(inputs_VH.float(), dim=1)
    inside_V = (unit_VH @ span.basis_kH.T).square().sum(1)
    return (1 - inside_V).clamp(min=0).sqrt() < near


@final
class _ReachedError(Exception):
    """The layer has been given its input."""


def layer_inputs(model: Any, layer: str, ids_BT: Tensor, place_BT: Tensor) -> Tensor | None:
    """``(B, T, H)``: what a layer is given for rows of tokens at these places; None where it is given no numbers.

    Args:
        model: A transformers model.
        layer: The name of the layer.
        ids_BT: Tokens.
        place_BT: Their positions, from 0.
    """
    seen: list[Any] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values())[0])
        raise _ReachedError

    accepted = inspect.signature(model.base_model.forward).parameters
    named_positions = {"position_ids": place_BT.to(model.device)} if "position_ids" in accepted else {}
    handle = model.get_submodule(layer).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model.base_model(input_ids=ids_BT.to(model.device), **named_positions)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if not seen or not isinstance(x := seen[0], Tensor) or x.dim() != 3:
        return None
    return x.detach().cpu() if x.is_floating_point() and x.shape[:2] == ids_BT.shape else None


def reads_tokens(model: Any, layer: str) -> bool:
    """Whether a layer's input at a place depends on the token there and on no other."""
    ids_BT, place_BT = torch.tensor([[3, 7, 9], [5, 7, 4]]), torch.arange(3).expand(2, 3)
    x = layer_inputs(model, layer, ids_BT, place_BT)
    return x is not None and bool(torch.allclose(x[0, 1], x[1, 1], rtol=1e-5, atol=1e-6))


def is_placed(model: Any, layer: str) -> bool:
    """Whether the same token is another input of such a layer elsewhere in a row."""
    x = layer_inputs(model, layer, torch.tensor([[7, 7]]), torch.arange(2)[None])
    return x is not None and not torch.allclose(x[0, 0], x[0, 1], rtol=1e-5, atol=1e-6)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A span in which tokens are looked for.

    Attributes:
        span: What is spanned.
        positions: First places of a row that are tried.
        through_rH: LoRA's A factor, where the change is that of its B factor, whose inputs are ``A x``.
    """

    span: Span
    positions: int = 1
    through_rH: Tensor | None = None


def found_in(model: Any, layer: str, probes: Sequence[Probe], *, tokens: int) -> list[set[tuple[int, int]]]:
    """``(place, token)`` of every input in each span, of all tokens of the vocabulary.

    Args:
        model: A transformers model.
        layer: The layer whose changes they are.
        probes: Where tokens are looked for; the layer's inputs are made once for all.
        tokens: V.
    """
    found: list[set[tuple[int, int]]] = [set() for _ in probes]
    open_ = [probe for probe in probes if not probe.span.is_full and len(probe.span.basis_kH)]
    for place in range(max((probe.positions for probe in open_), default=0)):
        for ids in torch.split(torch.arange(tokens), 8192):
            inputs = layer_inputs(model, layer, ids[:, None], torch.full((len(ids), 1), place))
            for hits, probe in zip(found, probes, strict=True):
                if inputs is None or place >= probe.positions:
                    continue
                x_VH, A_rH = inputs[:, 0].float(), probe.through_rH
                inside_V = tokens_in(probe.span, x_VH if A_rH is None else x_VH @ A_rH.float().cpu().T)
                hits |= {(place, token) for token in ids[inside_V].tolist()}
    return found
