"""A cohort model: many clients over one frozen transformers model.

Every tensor of a client passes through its own rows only, so that running eight clients, three, or
one gives the same numbers.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Self

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch, Objective
from lichen.core.errors import LichenError
from lichen.core.parameters import CENTER
from lichen.core.tree import Tree, digest, to_device
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.wrap import Wrapped, wrap
from lichen.models.findings import Findings, Recall, behind
from lichen.models.independence import prove_independent, running
from lichen.models.loading.load import frozen_eval
from lichen.models.loading.span import Span, span_of
from lichen.models.packed_cohort import base_of, make_packable, why_not_packed
from lichen.models.packing.frozen_prefix import FrozenPrefix

__all__ = ["Cohort", "flat_inputs", "group_of"]

LOCAL = "local"
"""Stands for the name of a model that lies in a folder."""


def group_of(name: str, tree: Tree, span: Span | None = None) -> str:
    """A short name for "these messages stack": the model's, and a digest of its trainable shapes.

    It crosses in each message. Where a model lies is another path on each machine, and stands for nothing: a model of a
    folder is ``local`` everywhere, so that its messages have the same bytes. A piece of a model is named by its blocks.

    >>> group_of("smollm", {}) == group_of("/home/ada/smollm", {}).replace("local", "smollm")
    True
    """
    shapes = "|".join(f"{key}{tuple(tree[key].shape)}" for key in sorted(tree))
    named = LOCAL if PurePath(name).is_absolute() or name.startswith(("~", ".")) else name
    blocks = "" if span is None else f"[{span}]"
    return f"{named}{blocks}/{hashlib.sha256(shapes.encode()).hexdigest()[:12]}"


def flat_inputs(batch: Batch) -> dict[str, Tensor]:
    """The model's inputs: (C, B, T) stacked to (C*B, T); hidden states in place of tokens where the batch has them."""
    mask = batch["attention_mask_CBT"].flatten(0, 1)
    if "hidden_CBTH" in batch:
        return {"inputs_embeds": batch["hidden_CBTH"].flatten(0, 1), "attention_mask": mask}
    return {"input_ids": batch["input_ids_CBT"].flatten(0, 1), "attention_mask": mask}


class Cohort(ABC):
    """What cohorts have in common: a frozen model that is wrapped and can be packed.

    Attributes:
        wrapped: The model with places for the clients' tensors.
        adapter: What is trained.
        name: The model's name in groups and messages.
        objective: What it is scored by.
        base: Digest of the frozen weights.
        group: What must be equal for two clients' messages to stack.
        reference: One call a client.
        packed: Clients that share a call do so without padding.
        alone: Because of what every client has a call of its own, whatever was asked for; else None.
        plain: Logits are the output layer of the hidden states, with no cap or factor after it.
        prefix: What keeps the frozen layers' output, where there are some below the lowest that is trained.
    """

    __slots__ = (
        "_backbone",
        "adapter",
        "alone",
        "base",
        "classes",
        "group",
        "name",
        "objective",
        "packed",
        "plain",
        "prefix",
        "reference",
        "wrapped",
    )

    alone: str | None
    prefix: FrozenPrefix | None
    packed: bool
    plain: bool

    def __init__(self, model: Any, adapter: Spec, name: str, *, objective: Objective, reference: bool | None) -> None:
        frozen_eval(model)
        self.wrapped: Wrapped = wrap(model, adapter, bare=span_of(model) is not None)
        self.adapter = adapter
        self.name = name
        self.objective, self.classes = objective, objective.classes
        self.base = digest(self.wrapped.frozen())
        self.group = group_of(name, self.wrapped.init(0), span_of(model))
        self.reference = model.device.type == "cpu" if reference is None else reference
        self._backbone = base_of(self.wrapped)

    def _admit(self, packed: bool | None, *, prove: bool, recall: Recall) -> None:
        """Make it packable, find out whether it then is, and that clients do not touch each other.

        Raises:
            LichenError: if packing is asked for and cannot be, or the model mixes rows.
        """
        self.prefix, self.packed = make_packable(self.wrapped), False
        packs = packed is not False and not self.reference

        def find() -> Findings:
            with running(self.wrapped.model):
                self.plain = self._is_plain()
                padded = why_not_packed(self) if packs else None
                self.packed = packs and padded is None
                alone = prove_independent(self) if prove else None
            return Findings(plain=self.plain, padded=padded, alone=alone)

        facts = behind(self.wrapped.model, self.base, self.adapter, packs, prove, objective=self.objective)
        found = recall(facts, find)
        self.plain, self.alone = found.plain, found.alone
        self.packed = packs and found.padded is None and found.alone is None
        self.reference = self.reference or found.alone is not None
        if packed and found.padded is not None:
            raise LichenError(
                f"its rows cannot be packed: {found.padded}", where=self.name, fix="set engine.packing: false"
            )

    @abstractmethod
    def _is_plain(self) -> bool:
        """Whether logits are the output layer of the hidden states, with no cap or factor after it."""

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: summed over labelled next tokens, or rows with a label or an answer; and their number.

        Raises:
            LichenError: if a label lies outside the classes, answers are named but not there, or a language model
                is to learn from a teacher's answers.
        """
        return self.loss_in(trainable_C, fixed, batch, reference=self.reference, packed=self.packed)

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row; raises as :meth:`loss`."""
        return self._run(trainable_C, fixed, batch, reference=self.reference, packed=self.packed, of_rows=True)

    def loss_in(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool
    ) -> tuple[Tensor, Tensor]:
        """:meth:`loss`, with the way clients are run side by side chosen by the caller."""
        return self._run(trainable_C, fixed, batch, reference=reference, packed=packed, of_rows=False)

    @property
    def row_width(self) -> int:
        """H, the numbers that :meth:`row_states` gives of a row."""
        return int(self.wrapped.model.config.get_text_config().hidden_size)

    @torch.no_grad()
    def row_states(self, batch: Batch) -> Tensor:
        """``(C, B, H)`` unit vectors: what the frozen model makes of each row, before anything is answered.

        It is the mean of the last hidden states over the row's tokens before the first that has a label, so that no
        answer is seen; over all tokens where rows have a class. A row without tokens has zeros.
        """
        batch = to_device(batch, self.wrapped.model.device)
        clients, rows, width = batch["input_ids_CBT"].shape
        seen_CBT = batch["attention_mask_CBT"] != 0
        if "labels_CBT" in batch:
            seen_CBT = seen_CBT & (batch["labels_CBT"] != -100).cumsum(-1).eq(0)
            seen_CBT[..., 0] = batch["attention_mask_CBT"][..., 0] != 0  # what begins a row is never asked for
        bare_C = {name: x[None] for name, x in self.wrapped.heads_as_loaded().items()}
        hidden = self.wrapped.call(bare_C, {}, part=self._backbone, **flat_inputs(batch))[0]
        hidden_CBTH = hidden.reshape(clients, rows, width, -1).float()
        mean_CBH = (hidden_CBTH * seen_CBT[..., None]).sum(2) / seen_CBT.sum(-1, keepdim=True).clamp(min=1)
        return nn.functional.normalize(mean_CBH, dim=-1)

    @contextmanager
    def _weighed(self, trainable_C: Tree, batch: Batch) -> Iterator[Tree]:
        """The tensors of layers; inside, of two adapters the second counts as much as a row is like the centre."""
        layers_C = dict(trainable_C)
        center_CH = layers_C.pop(CENTER, None)
        if center_CH is None:
            yield layers_C
            return
        second_CB = torch.einsum("cbh,ch->cb", self.row_states(batch), center_CH.float()).clamp(0, 1)
        with self.wrapped.packing.weighing(second_CB):
            yield layers_C

    @abstractmethod
    def _run(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool, of_rows: bool
    ) -> tuple[Tensor, Tensor]:
        """Losses and counts, ``(C,)`` or with ``of_rows`` ``(C, B)``."""

    def init(self, seed: int) -> Tree:
        """Trainable tensors without client axis, drawn from ``seed``; heads as the model was loaded."""
        return self.wrapped.init(seed)

    @property
    def checkpointing(self) -> bool:
        """Layers keep their input only and compute the rest again on the way back."""
        return self.wrapped.checkpointing

    def checkpointed(self) -> Self:
        """The same model with ``checkpointing``; this one stays as it is, and both share all weights."""
        other = copy.copy(self)
        other.wrapped = replace(self.wrapped, checkpointing=True)
        return other
