"""Cuts a client's whole change to a norm, at the client and again at the server: a transform.

    Δ ← Δ · min(1, S / ‖Δ‖)

What one client can move is then bounded by S, which is what client-level differential privacy needs, and what keeps one
client from drowning the others. The server cuts again, so that a client that does not cut gains nothing by it.

References:
    H. Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang. "Learning Differentially Private Recurrent Language
    Models." ICLR 2018. https://arxiv.org/abs/1710.06963

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property

__all__ = ["SLACK", "ClipChange"]

SLACK = 1e-6
"""Of the norm: what rounding may leave above it, and is not cut again."""


@final
@dataclass(frozen=True, slots=True)
class ClipChange:
    """The Euclidean norm of all tensors of real numbers of a message together is ``max_norm`` at most.

    Args:
        max_norm: S.

    Raises:
        LichenError: if it is not positive.
    """

    max_norm: float

    def __post_init__(self) -> None:
        if not 0 < self.max_norm < float("inf"):
            raise LichenError(f"{self.max_norm} is no norm to cut to", where="wire.clip", fix="use a number > 0")

    @property
    def name(self) -> str:
        """It keeps nothing."""
        return "clip"

    @property
    def key(self) -> str:
        """The recipe's."""
        return "wire.clip"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Nothing."""
        return ()

    @property
    def lacks(self) -> frozenset[Property]:
        """Nothing: under masks the server cannot cut again, and the client's own cut is all there is."""
        return frozenset()

    def declared(self, expected: Expected) -> Expected:
        """The same."""
        return expected

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        """The message, cut."""
        return self._cut(message), {}

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
        real_C = {name: x for name, x in message.tensors.items() if x.is_floating_point()}
        if not real_C:
            return message
        norm_C = trees.norm_C(real_C)
        factor_C = [1.0 if norm <= self.max_norm * (1 + SLACK) else self.max_norm / norm for norm in norm_C.tolist()]
        if all(factor == 1.0 for factor in factor_C):
            return message
        cut_C = {
            name: x * norm_C.new_tensor(factor_C).to(x).view(-1, *[1] * (x.dim() - 1)) for name, x in real_C.items()
        }
        return replace(message, tensors={**message.tensors, **cut_C})
