"""A cohort of one piece that is not the last: hidden states of C clients' rows.

The last piece needs nothing of its own: :class:`lichen.models.causal_cohort.CausalCohort` and
:class:`lichen.models.classifier_cohort.ClassifierCohort` take a batch with hidden states in place of tokens.

Legend: C clients, B rows, T tokens, H width.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, digest, to_device
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.wrap import Wrapped, wrap
from lichen.models.client_axis import map_clients
from lichen.models.cohort import flat_inputs, group_of
from lichen.models.loading.load import frozen_eval
from lichen.models.loading.span import Span, span_of
from lichen.models.packed_cohort import base_of, make_packable

__all__ = ["PieceCohort"]


@final
class PieceCohort:
    """A first or middle piece for C clients at once.

    Args:
        model: From :func:`lichen.models.pieces.carve.carve`, not the last piece.
        adapter: What of it is trained, from :func:`lichen.models.pieces.carve.spec_within`; perhaps nothing.
        name: The whole model's name in groups and messages.
        reference: One call a client (equal bits in any company) or all clients in one call; None: the first on a CPU,
            the second elsewhere.

    Attributes:
        wrapped: The piece with places for the clients' tensors.
        adapter: What is trained.
        name: The whole model's name.
        base: Digest of the frozen weights, whose names say which blocks these are.
        group: What must be equal for two clients' messages to stack; it names the piece.
        reference: One call a client.
        span: The blocks.

    Raises:
        LichenError: if the model is no piece, or the last one, or the adapter does not fit it.
    """

    __slots__ = ("_backbone", "_cacheless", "adapter", "base", "group", "name", "reference", "span", "wrapped")

    def __init__(self, model: Any, *, adapter: Spec, name: str, reference: bool | None = None) -> None:
        span = span_of(model)
        if span is None or span.last:
            raise LichenError("it is no first or middle piece", where=name, fix="use the cohort of its task")
        frozen_eval(model)
        self.span: Span = span
        self.wrapped: Wrapped = wrap(model, adapter, bare=True)
        self.adapter = adapter
        self.name = name
        self.base = digest(self.wrapped.frozen())
        self.group = group_of(name, self.wrapped.init(0), span)
        self.reference = model.device.type == "cpu" if reference is None else reference
        self._backbone = base_of(self.wrapped)
        accepted = inspect.signature(self.wrapped.model.base_model.forward).parameters
        self._cacheless: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        make_packable(self.wrapped)

    def init(self, seed: int) -> Tree:
        """Trainable tensors without client axis: that part of the whole model's, by name and bit for bit."""
        return self.wrapped.init(seed)

    def hidden(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``(C, B, T, H)``: what the piece makes of its rows; zeros where a client's own longest row is over.

        It can be differentiated in the trainable tensors and in ``hidden_CBTH``.

        Args:
            trainable_C: Stacked.
            fixed: Shared tensors without client axis.
            batch: With ``attention_mask_CBT``, and ``input_ids_CBT`` for the first piece, else ``hidden_CBTH``. Labels
                are not looked at.

        Raises:
            LichenError: if the batch has not what the piece takes, or hidden states of another width.
        """
        batch = to_device(check_entry(batch, self.wrapped.model), self.wrapped.model.device)
        width = batch["attention_mask_CBT"].shape[-1]

        def run(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            clients, rows, own = part["attention_mask_CBT"].shape
            inputs = flat_inputs(part) | self._cacheless
            out = self.wrapped.call(part_C, fixed, part=self._backbone, **inputs)[0]
            hidden_CBTH = out.reshape(clients, rows, own, -1)
            return (nn.functional.pad(hidden_CBTH, (0, 0, 0, width - own)) if own < width else hidden_CBTH,)

        return map_clients(run, trainable_C, batch, reference=self.reference)[0]

    @property
    def checkpointing(self) -> bool:
        """Blocks keep their input only and compute the rest again on the way back."""
        return self.wrapped.checkpointing

    def checkpointed(self) -> PieceCohort:
        """The same piece with ``checkpointing``; this one stays as it is, and both share all weights."""
        other = copy.copy(self)
        other.wrapped = replace(self.wrapped, checkpointing=True)
        return other


def check_entry(batch: Batch, model: Any) -> dict[str, Tensor]:
    """What of a batch a piece looks at.

    Raises:
        LichenError: if it has not what the piece takes, or another width.
    """
    span = span_of(model)
    entry = "input_ids_CBT" if span is None or span.first else "hidden_CBTH"
    if entry not in batch:
        raise LichenError(f"the piece {span} takes {entry}", where="batch", fix="run the pieces in their order")
    x = batch[entry]
    shape: tuple[int, ...] = tuple(batch["attention_mask_CBT"].shape)
    if entry == "hidden_CBTH":
        shape = (*shape, int(model.config.get_text_config().hidden_size))
    if tuple(x.shape) != shape:
        raise LichenError(f"{entry} has shape {tuple(x.shape)}, expected {shape}", where="batch")
    if x.is_floating_point():
        x = x.to(model.dtype)
    elif x.dtype != torch.int64:
        raise LichenError(f"{entry} has dtype {x.dtype}", where="batch")
    return {"active_C": batch["active_C"], "attention_mask_CBT": batch["attention_mask_CBT"], entry: x}
