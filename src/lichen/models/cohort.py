"""A cohort model: many clients over one frozen transformers model.

Every tensor of a client passes through its own rows only, so that running eight clients, three, or
one gives the same numbers. A language model's logits are never held whole: the output layer sees
the positions whose next token has a label, and nothing else.

Legend: C clients, B rows, T tokens, H width, K classes, R rows with a label.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, Objective
from lichen.core.errors import LichenError
from lichen.core.tree import Tree, digest, split, to_device
from lichen.models.adapters.kind import Spec
from lichen.models.adapters.wrap import Wrapped, wrap
from lichen.models.client_axis import clients_of, map_clients, one_client
from lichen.models.ends import with_one_end
from lichen.models.independence import prove_independent, running
from lichen.models.loading.load import frozen_eval
from lichen.models.objectives import Classification, NextToken, RowObjective
from lichen.models.packed_cohort import base_of, call_with_hidden, hidden_of, make_packable, why_not_packed
from lichen.models.packing.frozen_prefix import FrozenPrefix
from lichen.models.packing.packing import pack_rows
from lichen.models.token_losses import linear_loss_C, token_loss, token_losses
from lichen.models.tokens.token_targets import TokenPositions

__all__ = ["CausalCohort", "ClassifierCohort", "Cohort", "group_of"]


def group_of(name: str, tree: Tree) -> str:
    """A short name for "these messages stack": the model's, and a digest of its trainable shapes."""
    shapes = "|".join(f"{key}{tuple(tree[key].shape)}" for key in sorted(tree))
    return f"{name}/{hashlib.sha256(shapes.encode()).hexdigest()[:12]}"


def _flat(batch: Batch) -> dict[str, Tensor]:
    """The model's inputs: (C, B, T) stacked to (C*B, T)."""
    return {
        "input_ids": batch["input_ids_CBT"].flatten(0, 1),
        "attention_mask": batch["attention_mask_CBT"].flatten(0, 1),
    }


class Cohort(ABC):
    """What the two have in common: a frozen model that is wrapped and can be packed.

    Attributes:
        wrapped: The model with places for the clients' tensors.
        name: The model's name in groups and messages.
        objective: What it is scored by.
        base: Digest of the frozen weights.
        group: What must be equal for two clients' messages to stack.
        reference: One call a client.
        packed: Clients that share a call do so without padding.
        alone: Because of what every client has a call of its own, whatever was asked for; else None.
        prefix: What keeps the frozen layers' output, where there are some below the lowest that is trained.
    """

    __slots__ = (
        "_backbone",
        "alone",
        "base",
        "classes",
        "group",
        "name",
        "objective",
        "packed",
        "prefix",
        "reference",
        "wrapped",
    )

    alone: str | None
    prefix: FrozenPrefix | None
    packed: bool

    def __init__(self, model: Any, adapter: Spec, name: str, *, objective: Objective, reference: bool | None) -> None:
        frozen_eval(model)
        self.wrapped: Wrapped = wrap(model, adapter)
        self.name = name
        self.objective, self.classes = objective, objective.classes
        self.base = digest(self.wrapped.frozen())
        self.group = group_of(name, self.wrapped.init(0))
        self.reference = model.device.type == "cpu" if reference is None else reference
        self._backbone = base_of(self.wrapped)

    def _admit(self, packed: bool | None, *, prove: bool) -> None:
        """Make it packable, find out whether it then is, and that clients do not touch each other.

        Raises:
            LichenError: if packing is asked for and cannot be, or the model mixes rows.
        """
        self.prefix = make_packable(self.wrapped)
        self.packed = False
        if packed is not False and not self.reference:
            with running(self.wrapped.model):
                reason = why_not_packed(self)
            if packed and reason is not None:
                raise LichenError(
                    f"its rows cannot be packed: {reason}", where=self.name, fix="set engine.packing: false"
                )
            self.packed = reason is None
        with running(self.wrapped.model):
            self.alone = prove_independent(self) if prove else None
        if self.alone is not None:
            self.reference, self.packed = True, False

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


@final
class CausalCohort(Cohort):
    """A causal language model for C clients; a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        model: From :func:`lichen.models.loading.load.load_causal`.
        adapter: What is trained.
        name: The model's name in groups and messages.
        reference: One call a client (equal bits in any company) or all clients in one call; None:
            the first on a CPU, the second elsewhere.
        packed: Where clients share a call: without padding; None: if the model can.
        chunk: Labelled positions the output layer sees at once.
        prove: Check at once that no client's rows touch another's.

    Raises:
        LichenError: if the adapter does not fit the model, the model mixes rows, or packing is asked
            for and it cannot be packed.
    """

    __slots__ = ("_chunk", "_head", "_plain")

    def __init__(
        self,
        model: Any,
        *,
        adapter: Spec,
        name: str,
        reference: bool | None = None,
        packed: bool | None = None,
        chunk: int = 1024,
        prove: bool = True,
    ) -> None:
        super().__init__(model, adapter, name, objective=NextToken(), reference=reference)
        self._chunk = chunk
        names = {id(layer): path for path, layer in self.wrapped.model.named_modules()}
        self._head = names[id(self.wrapped.model.get_output_embeddings())]
        with running(self.wrapped.model):
            self._plain = self._is_plain()
        self._admit(packed, prove=prove)

    def _is_plain(self) -> bool:
        """Whether logits are the output layer of the hidden states, with no cap or factor after it."""
        start_C = {name: x[None] for name, x in self.wrapped.init(0).items()}
        ids = torch.arange(4, device=self.wrapped.model.device)[None]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad():
            whole = self.wrapped.call(start_C, {}, **inputs).logits
            hidden = self.wrapped.call(start_C, {}, part=self._backbone, **inputs)[0]
            short = self.wrapped.call(start_C, {}, part=self._head, **{self._input(): hidden})
        return bool(torch.allclose(whole, short, rtol=1e-3, atol=1e-3 * float(whole.abs().max())))

    def _input(self) -> str:
        return "x" if self._head in (*self.wrapped.heads, *self.wrapped.layers) else "input"

    def _run(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool, of_rows: bool
    ) -> tuple[Tensor, Tensor]:
        if split(fixed, "answers.")[0]:
            raise LichenError("a language model cannot learn from class answers", where="job", fix="use a classifier")

        if packed and not reference:
            return self._packed(trainable_C, fixed, batch, of_rows=of_rows)
        batch = to_device(batch, self.wrapped.model.device)

        def losses(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            return self._padded(part_C, fixed, part, of_rows=of_rows)

        loss, count = map_clients(losses, trainable_C, batch, reference=reference)
        return loss, count

    def positions(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> list[TokenPositions]:
        """Each client's labelled places, from which the output layer makes as many logits at once as one asks for."""
        batch = to_device(batch, self.wrapped.model.device)
        clients = clients_of(trainable_C, batch)
        if not self.reference:
            return self._positions(trainable_C, fixed, batch)
        parts = {name: torch.split(x, 1) for name, x in trainable_C.items()}
        alone = [({name: part[c] for name, part in parts.items()}, one_client(batch, c)) for c in range(clients)]
        return [self._positions(mine, fixed, one)[0] for mine, one in alone]

    def _padded(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, of_rows: bool) -> tuple[Tensor, ...]:
        positions = self._positions(trainable_C, fixed, batch)
        if of_rows:
            count_CB = ((batch["labels_CBT"][:, :, 1:] != -100) & batch["active_C"][:, None, None]).sum(-1)
            rows = [
                token_losses(one.head, one.hidden_RH, one.label_R, counts, chunk=self._chunk)
                for one, counts in zip(positions, count_CB.tolist(), strict=True)
            ]
            return torch.stack(rows), count_CB
        losses = [token_loss(one.head, one.hidden_RH, one.label_R, chunk=self._chunk) for one in positions]
        counts = torch.tensor([one.label_R.shape[0] for one in positions], device=batch["labels_CBT"].device)
        return torch.stack(losses), counts

    def _positions(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> list[TokenPositions]:
        clients, rows, width = batch["input_ids_CBT"].shape
        next_CBT = batch["labels_CBT"][:, :, 1:]
        inputs: dict[str, Any] = {**_flat(batch), "use_cache": False}
        if self._plain:
            out = self.wrapped.call(trainable_C, fixed, part=self._backbone, **inputs)[0]
        else:
            out = self.wrapped.call(trainable_C, fixed, **inputs).logits
        out_CBTH = out.reshape(clients, rows, width, -1)[:, :, :-1]
        positions = []
        for c in range(clients):
            chosen = (next_CBT[c] != -100) & batch["active_C"][c]
            head = self._head_of(trainable_C, fixed, c) if self._plain else lambda logits: logits
            positions.append(TokenPositions(out_CBTH[c][chosen], next_CBT[c][chosen], head))
        return positions

    def _packed(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, of_rows: bool) -> tuple[Tensor, Tensor]:
        if not self._plain:
            raise LichenError("logits are changed after the output layer", where=self.name, fix="use padded rows")
        pack = pack_rows(batch, to_label=True, device=self.wrapped.model.device)
        clients, counts = len(pack.labels), list(pack.labels)
        count_C = torch.tensor(pack.row_labels if of_rows else pack.labels).to(self.wrapped.model.device)
        count = count_C.view(clients, -1) if of_rows else count_C
        if not pack.tokens:
            nothing_C = torch.zeros(clients, device=count_C.device)
            loss_C = sum((x_C.flatten(1)[:, :0].sum(1) for x_C in trainable_C.values()), nothing_C)
            return loss_C[:, None].expand_as(count) if of_rows else loss_C, count
        hidden_NH = hidden_of(self.wrapped, trainable_C, fixed, pack, part=self._backbone, prefix=self.prefix)
        hidden_RH = hidden_NH.index_select(0, pack.at_R)
        if self._head in (*self.wrapped.heads, *self.wrapped.layers):
            parts = zip(torch.split(hidden_RH, counts), torch.split(pack.label_R, counts), strict=True)
            losses = []
            for c, (hidden, label) in enumerate(parts):
                mine = self._head_of(trainable_C, fixed, c)
                if of_rows:
                    losses.append(token_losses(mine, hidden, label, count[c].tolist(), chunk=self._chunk))
                else:
                    losses.append(token_loss(mine, hidden, label, chunk=self._chunk))
            return torch.stack(losses), count
        head, each = self.wrapped.model.get_output_embeddings(), pack.row_labels if of_rows else pack.labels
        loss = linear_loss_C(hidden_RH, head.weight, getattr(head, "bias", None), pack.label_R, each)
        return loss.view_as(count), count

    def _head_of(self, trainable_C: Tree, fixed: Tree, client: int) -> Callable[[Tensor], Tensor]:
        """The output layer of one client, for its own rows."""
        mine = {name: x[client : client + 1] for name, x in trainable_C.items()}

        def head(hidden_RH: Tensor) -> Tensor:
            logits_RV: Tensor = self.wrapped.call(mine, fixed, part=self._head, **{self._input(): hidden_RH})
            return logits_RV

        return head

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """Never: a language model's logits are too large to hold.

        Raises:
            LichenError: always.
        """
        raise LichenError("a language model's logits are never held whole", where=self.name, fix="ask for its loss")


@final
class ClassifierCohort(Cohort):
    """A sequence classifier for C clients; a :class:`lichen.core.contracts.model.CohortModel`.

    Args:
        model: From :func:`lichen.models.loading.load.load_classifier`.
        adapter: What is trained; its ``heads`` usually name the classification head.
        name: The model's name in groups and messages.
        reference: One call a client (equal bits in any company) or all clients in one call; None:
            the first on a CPU, the second elsewhere.
        packed: Where clients share a call: without padding; None: if the model can.
        objective: What its outputs are held against; None: they are logits of classes.
        prove: Check at once that no client's rows touch another's.

    Raises:
        LichenError: if the adapter does not fit the model, the model mixes rows, or packing is asked
            for and it cannot be packed.
    """

    __slots__ = ("_rows",)

    def __init__(
        self,
        model: Any,
        *,
        adapter: Spec,
        name: str,
        reference: bool | None = None,
        packed: bool | None = None,
        objective: RowObjective | None = None,
        prove: bool = True,
    ) -> None:
        self._rows: RowObjective = objective or Classification(int(model.config.num_labels))
        super().__init__(model, adapter, name, objective=self._rows, reference=reference)
        self._admit(packed, prove=prove)

    def _run(
        self, trainable_C: Tree, fixed: Tree, batch: Batch, *, reference: bool, packed: bool, of_rows: bool
    ) -> tuple[Tensor, Tensor]:
        patch, answers = split(fixed, "patch.")
        patch = {f"patch.{name}": x for name, x in patch.items()}

        def losses(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            logits_CBK = self._logits(part_C, patch, part, packed=packed and not reference)[0]
            objective = self._rows.losses_CB if of_rows else self._rows.losses_C
            return objective(logits_CBK, answers, to_device(part, logits_CBK.device))

        loss, count = map_clients(losses, trainable_C, batch, reference=reference)
        return loss, count

    def _logits(self, trainable_C: Tree, fixed: Tree, batch: Batch, *, packed: bool) -> tuple[Tensor, ...]:
        clients, rows = batch["input_ids_CBT"].shape[:2]
        pack = pack_rows(batch, to_label=False, device=self.wrapped.model.device) if packed else None
        inputs: dict[str, Any] = {**_flat(to_device(batch, self.wrapped.model.device))}
        inputs = with_one_end(self.wrapped.model.config, **inputs)
        if pack is not None and pack.tokens:
            hidden_NH = hidden_of(self.wrapped, trainable_C, fixed, pack, part=self._backbone, prefix=self.prefix)
            logits = call_with_hidden(self.wrapped, trainable_C, fixed, hidden_NH, pack, **inputs).logits
        else:
            logits = self.wrapped.call(trainable_C, fixed, **inputs).logits
        return (logits.reshape(clients, rows, -1),)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK``."""
        packed = self.packed and not self.reference

        def logits(part_C: Tree, part: Batch) -> tuple[Tensor, ...]:
            return self._logits(part_C, fixed, part, packed=packed)

        return map_clients(logits, trainable_C, batch, reference=self.reference)[0]
