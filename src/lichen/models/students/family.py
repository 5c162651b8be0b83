"""A family of student sizes, and the largest that a client's memory can train.

Clients of a federation are unlike: one has a few megabytes to spare, another some gigabytes. Where models
exchange answers instead of weights, each client may take the largest that it can train. What training
needs is counted, not guessed: the model runs forward once on tensors that have shapes and no numbers, and
what the way back would need of it is added up.

While a client trains in this house it holds its tensors three times: as they were sent, as it began, to
tell the difference, and as they are now; the moments twice, as it began, should it fail, and now. On top
come the gradients, and then either the activations they come from or the new tensors and moments that a
step makes before the old ones go. Both need room to work: on the way back about twice the largest
activation, in the step one piece the size of the largest tensor for itself and for each moment.

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581 (clients design their own models)
    Enmao Diao, Jie Ding and Vahid Tarokh. "HeteroFL: Computation and Communication Efficient Federated
    Learning for Heterogeneous Clients." ICLR 2021. https://arxiv.org/abs/2010.01264 (models by capability)

Legend: C clients, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, Literal, TypeVar, final

import torch
from torch import Tensor, nn

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import nbytes
from lichen.models.students.student import Student

__all__ = ["Optimizer", "family", "largest_fitting", "need"]

Optimizer = Literal["sgd", "momentum", "adamw"]
"""How a client steps: with no, one or two moments a parameter."""

MOMENTS: Mapping[str, int] = {"sgd": 0, "momentum": 1, "adamw": 2}

Config = TypeVar("Config")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StudentMemory:
    """Bytes that one client's training takes.

    Attributes:
        parameters: The client's tensors.
        moments: The optimizer's.
        activations: What the way back needs of the way forward, for one batch.
        batch: The batch itself.
        backward_bytes: To work in on the way back.
        step_bytes: To work in while stepping.
    """

    parameters: int
    moments: int
    activations: int
    batch: int
    backward_bytes: int
    step_bytes: int

    @property
    def total(self) -> int:
        """The most that is held at once."""
        stands = 3 * self.parameters + 2 * self.moments + self.batch
        gradients, update = self.parameters, self.parameters + self.moments
        return stands + gradients + max(self.activations + self.backward_bytes, update + self.step_bytes)


@final
@dataclass(frozen=True, slots=True)
class Member(Generic[Config]):
    """One model of a family.

    Args:
        config: What it is made from.
        model: The model.
        need: What training it takes.
    """

    config: Config
    _: KW_ONLY
    model: Student
    need: StudentMemory


def need(model: Student, batch: Batch, *, optimizer: Optimizer = "adamw") -> StudentMemory:
    """What training this model on batches of this shape takes.

    Args:
        model: A student.
        batch: One client's batch, ``(1, B, ...)``; its shapes and dtypes alone are looked at.
        optimizer: How the client steps.

    Raises:
        LichenError: if the optimizer is unknown, or the batch lacks an input of the model.

    >>> from lichen.models.students.students import ImageMLP
    >>> need(ImageMLP(8, hidden=(4,), classes=2), {"x_CBF": torch.zeros(1, 16, 8)}, optimizer="sgd").parameters
    184
    """
    if optimizer not in MOMENTS:
        raise LichenError(f"unknown optimizer {optimizer!r}", where="family.optimizer", fix=f"use {', '.join(MOMENTS)}")
    missing = [name for name in model.inputs if name not in batch]
    if missing:
        raise LichenError(f"the batch lacks {missing[0]!r}", where="family.batch", fix="give one of the client's own")
    params = {name: x.to("meta").requires_grad_() for name, x in model.init(0).items()}
    inputs = tuple(batch[name][0].to("meta") for name in model.inputs)
    size = nbytes(params)
    pieces = _activations(model, params, inputs)
    return StudentMemory(
        parameters=size,
        moments=MOMENTS[optimizer] * size,
        activations=sum(pieces),
        batch=nbytes(dict(batch)),
        backward_bytes=2 * max(pieces, default=0),
        step_bytes=(1 + MOMENTS[optimizer]) * max(nbytes({name: x}) for name, x in params.items()),
    )


def _activations(model: Student, params: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> list[int]:
    """Bytes kept for the way back, each piece of memory once; parameters and the batch are there anyway."""
    known = {x.untyped_storage()._cdata for x in (*params.values(), *inputs)}
    # Held until the sum is made, so that no two of them get one address.
    storages: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        storages.setdefault(x.untyped_storage()._cdata, x)
        return x.detach()  # a graph that keeps its own output by a hook is never freed

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits_BK = model.apply(dict(params), *inputs)
        labels_B = torch.zeros(logits_BK.shape[0], dtype=torch.int64, device="meta")
        loss = nn.functional.cross_entropy(logits_BK, labels_B, reduction="sum")
    pieces = [x for place, x in storages.items() if place not in known]
    del loss
    return [x.untyped_storage().nbytes() for x in pieces]


def family(
    configs: Iterable[Config], make: Callable[[Config], Student], batch: Batch, *, optimizer: Optimizer = "adamw"
) -> tuple[Member[Config], ...]:
    """The models of some configurations, those that need least first; raises as :func:`need`."""
    made = [(config, make(config)) for config in configs]
    members = [Member(config, model=model, need=need(model, batch, optimizer=optimizer)) for config, model in made]
    return tuple(sorted(members, key=lambda member: member.need.total))


def largest_fitting(memory_bytes: int, members: Sequence[Member[Any]]) -> Member[Any]:
    """The one with most parameters among those that fit.

    Args:
        memory_bytes: What the client can spare.
        members: From :func:`family`.

    Raises:
        LichenError: if not even the smallest fits.
    """
    fits = [member for member in members if member.need.total <= memory_bytes]
    if not fits:
        least = min((member.need.total for member in members), default=0)
        raise LichenError(
            f"{memory_bytes:,} bytes train no model of the family, the smallest takes {least:,}",
            where="family",
            fix="add a smaller model, or lower the batch size",
        )
    return max(fits, key=lambda member: member.need.parameters)
