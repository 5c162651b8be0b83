"""The gradient of the loss on a client's rows at the shared tensors: one tensor for each, weighed by the rows.

Messages are folded by a mean, so that the server learns the gradient of the mean loss over all rows from one sum.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.expected import Expected, MetricSpec, specs_of, within
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["Gradient"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientState:
    """A block of clients in the middle of it.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        params_C: The shared tensors.
        grads_C: Gradients of the summed loss so far.
        sums: ``loss_sum`` and ``count``, ``(C,)`` float64.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    grads_C: Tree
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class Gradient:
    """A client work whose message is the gradient of its mean loss; it changes nothing and keeps nothing.

    Args:
        model: Runs C clients at once.
        with_loss: The message also has the summed loss and the number of rows or tokens.
    """

    model: CohortModel
    _: KW_ONLY
    with_loss: bool = True

    def expected(self, job: Job) -> Expected:
        """A tensor for each trainable one, and the metrics that go with them."""
        return Expected(group=self.model.group, tensors=specs_of(job.shared.trainable), metrics=self._metrics())

    def _metrics(self) -> dict[str, MetricSpec]:
        names = ("loss_sum", "count") if self.with_loss else ()
        return {name: self.model.objective.specs()[name] for name in names}

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> GradientState:
        """Gradients and sums at zero."""
        params_C = trees.broadcast(job.shared.trainable, len(clients))
        zero_C = torch.zeros(len(clients), dtype=torch.float64, device=job.shared.device)
        return GradientState(
            job=job,
            clients=tuple(clients),
            params_C=params_C,
            grads_C=trees.zeros_like(params_C),
            sums={"loss_sum": zero_C, "count": zero_C},
        )

    def step(self, state: GradientState, batch: Batch) -> GradientState:
        """With one more batch in the sums; inactive clients stay bit-unchanged."""
        leaves_C = {name: x.detach().requires_grad_() for name, x in state.params_C.items()}
        active_C = batch["active_C"].to(next(iter(leaves_C.values())).device)
        with torch.enable_grad():
            loss_C, count_C = self.model.loss(leaves_C, state.job.shared.fixed, batch)
            loss_C = torch.where(active_C, loss_C, torch.zeros_like(loss_C))
            more = torch.autograd.grad(loss_C.sum(), list(leaves_C.values()), allow_unused=True, materialize_grads=True)
        seen = {"loss_sum": loss_C.detach(), "count": torch.where(active_C, count_C, torch.zeros_like(count_C))}
        return GradientState(
            job=state.job,
            clients=state.clients,
            params_C=state.params_C,
            grads_C=trees.add(state.grads_C, dict(zip(leaves_C, more, strict=True))),
            sums={name: total + seen[name].double() for name, total in state.sums.items()},
        )

    def final(self, state: GradientState) -> tuple[Message, Tree | None]:
        """The message, weighed by the labelled rows or tokens; a client whose gradient is not finite weighs nothing."""
        count_C = state.sums["count"]
        finite_C = torch.ones_like(count_C, dtype=torch.bool)
        for x_C in state.grads_C.values():
            finite_C = finite_C & x_C.flatten(1).isfinite().all(1)
        divisor_C = count_C.clamp(min=1)
        tensors = {
            name: torch.where(_along(finite_C, x_C), x_C / _along(divisor_C, x_C).to(x_C), torch.zeros_like(x_C))
            for name, x_C in state.grads_C.items()
        }
        message = Message(
            group=self.model.group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors=tensors,
            weight_C=count_C * finite_C,
            metrics=within(state.sums, self._metrics()) if self.with_loss else {},
        )
        return message, None


def _along(x_C: Tensor, like_C: Tensor) -> Tensor:
    return x_C.view(-1, *[1] * (like_C.dim() - 1))
