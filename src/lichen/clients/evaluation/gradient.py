"""The gradient of the loss on a client's rows at the shared tensors: one tensor for each, weighed by the rows.

Messages are folded by a mean, so that the server learns the gradient of the mean loss over all rows from one sum.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from lichen.clients.evaluation.evaluate import Evaluate, EvaluateState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.expected import Expected, specs_of
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["Gradient"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GradientState:
    """A block of clients in the middle of it; ``grads_C`` of the summed loss."""

    scores: EvaluateState
    grads_C: Tree


@final
@dataclass(frozen=True, slots=True)
class Gradient:
    """A client work whose message is the gradient of its mean loss; it changes nothing and keeps nothing.

    Args:
        model: Runs C clients at once.
    """

    model: CohortModel

    def expected(self, job: Job) -> Expected:
        """A tensor for each trainable one, and the sums of an evaluation."""
        return replace(Evaluate(self.model).expected(job), tensors=specs_of(job.shared.trainable))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> GradientState:
        """Gradients at zero."""
        scores = Evaluate(self.model).init(job, clients, None)
        return GradientState(scores=scores, grads_C=trees.zeros_like(scores.params_C))

    def step(self, state: GradientState, batch: Batch) -> GradientState:
        """With one more batch in the sums."""
        leaves_C = {name: x.detach().requires_grad_() for name, x in state.scores.params_C.items()}
        active_C = batch["active_C"].to(next(iter(leaves_C.values())).device)
        with torch.enable_grad():
            loss_C, _ = self.model.loss(leaves_C, state.scores.fixed, batch)
            loss = torch.where(active_C, loss_C, torch.zeros_like(loss_C)).sum()
            more = torch.autograd.grad(loss, list(leaves_C.values()), allow_unused=True, materialize_grads=True)
        grads_C = trees.add(state.grads_C, dict(zip(leaves_C, more, strict=True)))
        return GradientState(scores=Evaluate(self.model).step(state.scores, batch), grads_C=grads_C)

    def final(self, state: GradientState) -> tuple[Message, Tree | None]:
        """The message, weighed by the labelled rows or tokens; a client whose gradient is not finite weighs nothing."""
        message, _ = Evaluate(self.model).final(state.scores)
        count_C = message.weight_C.clamp(min=1)
        finite_C = torch.ones_like(count_C, dtype=torch.bool)
        for x_C in state.grads_C.values():
            finite_C = finite_C & x_C.flatten(1).isfinite().all(1)
        tensors = {
            name: torch.where(_along(finite_C, x_C), x_C / _along(count_C, x_C).to(x_C), torch.zeros_like(x_C))
            for name, x_C in state.grads_C.items()
        }
        return replace(message, tensors=tensors, weight_C=message.weight_C * finite_C), None


def _along(x_C: torch.Tensor, like_C: torch.Tensor) -> torch.Tensor:
    return x_C.view(-1, *[1] * (like_C.dim() - 1))
