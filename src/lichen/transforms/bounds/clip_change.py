"""Cuts a client's whole change to a norm, at the client and again at the server: a transform.

    Δ ← Δ · min(1, S / ‖Δ‖)

What one client can move is then bounded by S, which is what client-level differential privacy needs, and what keeps one
client from drowning the others. The server cuts again what it has decoded, so that neither what error feedback adds,
nor a codec, nor a client that does not cut gains anything by it.

Under privacy a message has the clipped change alone: a loss or a count of one client is a release of its rows.

References:
    H. Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang. "Learning Differentially Private Recurrent Language
    Models." ICLR 2018. https://arxiv.org/abs/1710.06963

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property

__all__ = ["ClipChange"]

SLACK = 1e-6
"""Of the norm: what rounding may leave above it, and is not cut again."""


@final
@dataclass(frozen=True, slots=True)
class ClipChange:
    """The Euclidean norm of all tensors of real numbers of a message together is ``max_norm`` at most.

    Args:
        max_norm: S.
        private: For the recipe's ``privacy``: the metrics of training stay with the client.

    Raises:
        LichenError: if it is not positive.
    """

    max_norm: float
    _: KW_ONLY
    private: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < float("inf"):
            raise LichenError(f"{self.max_norm} is no norm to cut to", where=self.key, fix="use a number > 0")

    @property
    def name(self) -> str:
        """It keeps nothing."""
        return "clip"

    @property
    def key(self) -> str:
        """The recipe's."""
        return "privacy.clip" if self.private else "wire.clip"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Nothing."""
        return ()

    @property
    def lacks(self) -> frozenset[Property]:
        """Nothing: under masks the server cannot cut again, and the client's own cut is all there is."""
        return frozenset()

    def declared(self, expected: Expected) -> Expected:
        """The same; under privacy without metrics."""
        return replace(expected, metrics={}) if self.private else expected

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        """The message, cut; under privacy without its metrics."""
        cut = self._cut(message)
        return replace(cut, metrics={}) if self.private else cut, {}

    @property
    def measures(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def on_arrival(self, message: Message, expected: Expected, state: Tree) -> Message:
        """The message, cut where it was not; one that was keeps its bits."""
        return self._cut(message)

    def on_total(
        self, change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
    ) -> tuple[Shared, dict[str, float], Tree]:
        """The change as it is."""
        return change, {}, {}

    def _cut(self, message: Message) -> Message:
        """In float64, and by so much more that what is rounded to the message's numbers does not lie above the norm."""
        real_C = {name: x for name, x in message.tensors.items() if x.is_floating_point()}
        if not real_C:
            return message
        exact_C = {name: x.double() for name, x in real_C.items()}
        norm_C = trees.norm_C(exact_C)
        fits_C = norm_C <= self.max_norm * (1 + SLACK)
        if bool(fits_C.all()):
            return message
        coarsest = max(torch.finfo(x.dtype).eps for x in real_C.values())
        below = self.max_norm if coarsest < SLACK else self.max_norm * (1 - coarsest)
        factor_C = torch.where(fits_C, 1.0, below / norm_C)
        cut_C = {
            name: (x * factor_C.to(x).view(-1, *[1] * (x.dim() - 1))).to(real_C[name]) for name, x in exact_C.items()
        }
        return replace(message, tensors={**message.tensors, **cut_C})
