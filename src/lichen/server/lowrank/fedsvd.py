"""FedSVD: clients train B; between rounds A follows the product's right singular vectors.

    U S V = B̄ A,    A ← V,    B ← U S    (all r directions)

Averaging B over a frozen A is exact, and under noise it is not squared as it is where both halves are
noisy, but a random A for ever is a poor one. The new halves hold the same product, with the rows of A
orthonormal. Only the mean and the shared A are used, so it works on masked sums and is mere
post-processing of a private one: it wraps any aggregator that makes a mean.

References:
    Seanie Lee, Sangwoo Park, Dong Bok Lee, Dominik Wagner, Haebin Seong, Tobias Bocklet, Juho Lee and
    Sung Ju Hwang. "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA." NeurIPS
    2025. https://arxiv.org/abs/2505.12805

Legend: m rows of a layer's weight (out), n columns (in), r adapter rank.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, final

import torch

from lichen.core.contracts.server import Aggregator
from lichen.core.conventions.factor_pairs import factor_names, layers_with_factors
from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import AroundAggregator
from lichen.server.lowrank.adapters import initial_A
from lichen.server.lowrank.factors import directions
from lichen.server.mean import Mean

__all__ = ["FedSVD"]


@final
@dataclass(frozen=True, slots=True)
class FedSVD(AroundAggregator):
    """An aggregator's mean of B, written as new halves of the same product with orthonormal rows of A.

    The clients' work must leave A alone (``phases=(("lora_A",),)``), and the server optimizer must add the
    change as it is (SGD at rate 1).

    Args:
        inner: Makes the mean; :func:`lichen.server.lowrank.lowrank.FedIT` takes unequal ranks, too.
        seed: Of rows of A beyond a layer's own width or height, which have no direction to turn to.
    """

    inner: Aggregator = field(default_factory=Mean)
    _: KW_ONLY
    seed: int = 0

    @property
    def one_version(self) -> bool:
        """A client's B is of the A that it was sent."""
        return True

    def before(self, message: Message) -> Message:
        """The message itself."""
        return message

    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """The inner change with new halves for every layer whose B was sent, in float64; the inner metrics.

        Raises:
            LichenError: as the inner one, or if clients trained A.
        """
        change, metrics = self.inner.close(total, shared)
        written: Tree = {}
        before, sent = shared.trainable, change.trainable
        for layer in layers_with_factors(before):
            names = factor_names(layer)[::-1]
            if names[1] in sent:
                raise LichenError(
                    f"clients trained {names[1]!r}, which FedSVD turns on the server",
                    where="aggregator.fedsvd",
                    fix="freeze lora_A on the clients",
                )
            if names[0] not in sent:
                continue
            B_mr, A_rn = (before[name].cpu().double() for name in names)
            U, sigma, V = directions((B_mr + sent[names[0]].cpu().double(), A_rn))
            newB_mr, newA_rn = torch.zeros_like(B_mr), initial_A(A_rn, layer, seed=self.seed, version=0)
            newB_mr[:, : len(sigma)], newA_rn[: len(sigma)] = U * sigma, V
            written |= {names[0]: newB_mr - B_mr, names[1]: newA_rn - A_rn}
        return change | Shared(written), metrics
