"""What a load costs in floating-point operations: by a transformer's weights, or as torch counts them on a real step.

The formula stands in :mod:`lichen.models.arithmetic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.workload import Workload, workload_of

__all__ = ["Counted", "Flops", "counted"]


class Flops(Protocol):
    """What a load costs, in floating-point operations."""

    def forward(self, load: Workload, /) -> float:
        """Evaluation."""
        ...

    def train(self, load: Workload, /) -> float:
        """Forward and backward."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A small model whose operations torch counted on one real step, a row's share of them.

    Attributes:
        forward_row: Operations of a row forward.
        train_row: Forward and backward.
    """

    forward_row: float
    train_row: float

    def forward(self, workload: Workload) -> float:
        """Rows times a row's."""
        return workload.rows * self.forward_row

    def train(self, workload: Workload) -> float:
        """Rows times a row's."""
        return workload.rows * self.train_row


def counted(model: CohortModel, start: Shared, batch: Batch) -> Counted:
    """Let torch count one step of one client; padding is in it.

    Args:
        model: Any model that trains all its tensors.
        start: Its tensors, a teacher's answers included where rows name answers.
        batch: A step of one client.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    fixed, own_C = start.fixed, {n: x.requires_grad_() for n, x in trees.broadcast(start.trainable, 1).items()}
    with FlopCounterMode(display=False) as forward:
        loss_C, _ = model.loss(own_C, fixed, batch)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(loss_C.sum(), list(own_C.values()), allow_unused=True)
    rows, once = max(1, workload_of(batch).rows), forward.get_total_flops()
    return Counted(forward_row=once / rows, train_row=(once + backward.get_total_flops()) / rows)
