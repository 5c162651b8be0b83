"""Runs a wrapped model on packed rows, and proves at load time that this is exact.

The base model sees one row of N tokens with their own positions. A language model's output layer then
takes the labelled ones as they come; a classifier's own head is given the hidden states laid out in
padded rows again, so that whatever it does with them (first token, last token, mean) stays its own.

Legend: C clients, B rows, T tokens of a padded row, N packed tokens, H width.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lichen.core.contracts.model import Batch, Objective
from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.models.adapters.wrap import Wrapped
from lichen.models.loading.span import span_of
from lichen.models.packing.attention import register
from lichen.models.packing.frozen_prefix import FrozenPrefix, frozen_blocks
from lichen.models.packing.norms import quicken_norms
from lichen.models.packing.packing import Pack, Packing

__all__ = ["base_of", "call_with_hidden", "hidden_of", "make_packable", "why_not_packed"]


class _Cohort(Protocol):
    wrapped: Wrapped

    @property
    def objective(self) -> Objective: ...
    def init(self, seed: int) -> Tree: ...
    def loss_in(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool
    ) -> tuple[Tensor, Tensor]: ...


def base_of(wrapped: Wrapped) -> str:
    """The name of the submodule that gives hidden states."""
    names = {id(layer): path for path, layer in wrapped.model.named_modules()}
    return str(names[id(wrapped.model.base_model)])


def make_packable(wrapped: Wrapped) -> FrozenPrefix | None:
    """Teach the wrapped structure packed calls; padded calls go on as before.

    Returns:
        What keeps the frozen layers' output, where there are some below the lowest that is trained.
    """
    register()
    packing, base = wrapped.packing, wrapped.model.base_model
    packing.configs = tuple({id(c): c for m in wrapped.model.modules() if (c := getattr(m, "config", None))}.values())
    for layer in wrapped.model.modules():
        layer.packing = packing
    quicken_norms(wrapped.model, packing)
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in wrapped.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            _checkpoint(layer, packing)
    pooler, forward = getattr(base, "pooler", None), base.forward

    def shim(*inputs: Any, **named: Any) -> Any:
        hidden = packing.hidden
        if hidden is None:
            return forward(*inputs, **named)
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        pooled = base.pooler(hidden) if isinstance(pooler, nn.Module) else None
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)

    # transformers and we ask a forward for its arguments.
    shim.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    base.forward = shim
    if isinstance(pooler, nn.Module):
        pool = pooler.forward
        # In a packed call the first token is one row's alone, and nobody asks for it.
        pooler.forward = lambda x, *more, **named: x[:, 0] if packing.current else pool(x, *more, **named)
    part = f"{base_of(wrapped)}."
    trained = [path.removeprefix(part) for path in (*wrapped.layers, *wrapped.heads) if path.startswith(part)]
    blocks = frozen_blocks(base, trained)
    return FrozenPrefix(blocks, packing) if blocks else None


def _checkpoint(layer: nn.Module, packing: Packing) -> None:
    """Let a layer, in calls that ask for it, keep nothing but its input (Chen et al., "Training Deep
    Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174).
    """
    forward = layer.forward

    def light(*inputs: Any, **named: Any) -> Any:
        pack = packing.current
        if not packing.checkpointing or not torch.is_grad_enabled():
            return forward(*inputs, **named)
        # By the time of the way back the clients' tensors have left the model: they are put in again.
        lasting = layer.state_dict(keep_vars=True).keys()
        tensors = {name: x for name, x in layer.named_buffers() if name not in lasting and x.numel()}

        def again(*inputs: Any) -> Any:
            with packing.holding(pack, checkpointing=False):
                return functional_call(layer, tensors, inputs, named, tie_weights=False)

        return checkpoint(again, *inputs, use_reentrant=False)

    layer.forward = light


def hidden_of(
    wrapped: Wrapped, trainable_C: Tree, fixed: Tree, pack: Pack, *, part: str, prefix: FrozenPrefix | None = None
) -> Tensor:
    """``(N, H)``: the base model's hidden states of packed tokens."""

    def run(pack: Pack) -> Tensor:
        return _run(wrapped, trainable_C, fixed, pack, part)

    if prefix is None:
        return run(pack)
    known_NH = prefix.hidden(pack, run)
    hidden_NH: Tensor = prefix.knowing(known_NH, lambda: run(pack))
    return hidden_NH


def _run(wrapped: Wrapped, trainable_C: Tree, fixed: Tree, pack: Pack, part: str) -> Tensor:
    accepted = inspect.signature(wrapped.model.base_model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": pack.ids_N[None], "attention_mask": None}
    if "position_ids" in accepted:
        inputs["position_ids"] = pack.position_N[None]
    # Where the model has types at all: GPT-2 would look them up among its words.
    if "token_type_ids" in accepted and getattr(wrapped.model.config, "type_vocab_size", None):
        inputs["token_type_ids"] = torch.zeros_like(pack.ids_N)[None]
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    with wrapped.packing.holding(pack):
        hidden_NH: Tensor = wrapped.call(trainable_C, fixed, part=part, **inputs)[0][0]
    return hidden_NH


def call_with_hidden(
    wrapped: Wrapped, trainable_C: Tree, fixed: Tree, hidden_NH: Tensor, pack: Pack, **inputs: Any
) -> Any:
    """The whole model's output for padded rows whose hidden states are known; zeros where there was no token."""
    rows, width = inputs["input_ids"].shape
    padded = hidden_NH.new_zeros(rows * width, hidden_NH.shape[1]).index_copy(0, pack.flat_N, hidden_NH)
    wrapped.packing.hidden = padded.view(rows, width, -1)
    try:
        return wrapped.call(trainable_C, fixed, **inputs)
    finally:
        wrapped.packing.hidden = None


def _tiny(config: Any, objective: Objective, device: torch.device) -> dict[str, Tensor]:
    """Two clients with two rows each, of 8, 5, 3 and 7 tokens."""
    length_CB = torch.tensor([[8, 5], [3, 7]])
    mask_CBT = (torch.arange(8) < length_CB[..., None]).long()
    ids_CBT = torch.randint(config.vocab_size, (2, 2, 8), generator=torch_generator(0, "packed"))
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 < end < config.vocab_size:
        # Some classifiers read the hidden state at the one end token.
        ids_CBT = torch.where(ids_CBT == end, end - 1, ids_CBT)
        ids_CBT.scatter_(2, length_CB[..., None] - 1, end)
    pad = getattr(config, "pad_token_id", None)
    ids_CBT = torch.where(mask_CBT == 1, ids_CBT, pad if isinstance(pad, int) else 0)
    batch = {
        "active_C": torch.ones(2, dtype=torch.bool),
        "input_ids_CBT": ids_CBT,
        "attention_mask_CBT": mask_CBT,
        "index_CB": torch.arange(2).expand(2, 2).clone(),
    }
    batch |= objective.made_up(ids_CBT, mask_CBT)
    return {name: x.to(device) for name, x in batch.items()}


def why_not_packed(cohort: _Cohort) -> str | None:
    """Compare packed with padded on a tiny batch: None if loss and gradients agree, else what is amiss."""
    model, start = cohort.wrapped.model, cohort.init(0)
    for path in cohort.wrapped.layers:
        if reason := getattr(model.get_submodule(path), "padded_only", None):
            return str(reason)
    span = span_of(model)
    if span is not None and not span.first:
        return "it takes hidden states"
    batch = _tiny(model.config.get_text_config(), cohort.objective, model.device)
    half = model.dtype in (torch.bfloat16, torch.float16)
    found: list[tuple[Tensor, Tensor]] = []
    for packed in (False, True):
        trainable_C = {
            name: (x + 0.02 * torch.randn((2, *x.shape), generator=torch_generator(1, name)).to(x)).requires_grad_()
            for name, x in start.items()
        }
        leaves = list(trainable_C.values())
        try:
            loss_C, _ = cohort.loss_in(trainable_C, {}, batch, reference=False, packed=packed)
            grads = torch.autograd.grad(loss_C.sum(), leaves, allow_unused=True, materialize_grads=True)
        except (LichenError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            if not packed:
                raise
            return str(error).splitlines()[0]
        found.append((loss_C.detach().double(), torch.cat([g.flatten(1) for g in grads], 1).double()))
    (loss_C, grad_CP), (packed_C, packed_CP) = found
    # A wrong mask or position moves both by far more than rounding does; the gradients of a deep model in half
    # precision lie some 20 per cent from the true ones, packed and padded alike.
    off = float(((packed_C - loss_C) / loss_C).abs().max()), float((packed_CP - grad_CP).norm() / grad_CP.norm())
    if off[0] <= (0.02 if half else 1e-4) and off[1] <= (0.6 if half else 1e-3):
        return None
    return f"packed rows move its loss by {off[0]:.2g} and its gradients by {off[1]:.2g}"
