"""Bounds what one client can move, and lets nothing but its clipped change leave: a transform.

At the client all tensors of a message together are cut to a norm, after training and before they are coded, and the
metrics of training are left out: a loss or a count of one client is a release of its rows. The server cuts again what
it has decoded, so that neither what error feedback adds, nor a codec, nor a client that does not cut can
move the sum by more.

References:
    H. Brendan McMahan, Daniel Ramage, Kunal Talwar and Li Zhang. "Learning Differentially Private Recurrent Language
    Models." ICLR 2018. https://arxiv.org/abs/1710.06963

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from lichen.core import tree as trees
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property
from lichen.transforms.bounds.clip_change import SLACK, ClipChange

__all__ = ["PrivateClip"]


@final
@dataclass(frozen=True, slots=True)
class PrivateClip:
    """A client's change has the norm ``clip`` at most, and brings no metric.

    Args:
        clip: C.

    Raises:
        LichenError: if it is not positive.
    """

    clip: ClipChange

    @property
    def name(self) -> str:
        """It keeps nothing."""
        return "private"

    @property
    def key(self) -> str:
        """The recipe's."""
        return "privacy"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Nothing."""
        return ()

    @property
    def lacks(self) -> frozenset[Property]:
        """Nothing."""
        return frozenset()

    def declared(self, expected: Expected) -> Expected:
        """The same tensors, and no metrics."""
        return replace(expected, metrics={})

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        """The message, cut, without its metrics."""
        cut, own_C = self.clip.on_client(message, own_C, job, clients)
        return replace(cut, metrics={}), own_C

    @property
    def measures(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def on_arrival(self, message: Message, expected: Expected, state: Tree) -> Message:
        """The message, cut where it was not: in float64, and by so much more that no rounding lies above the clip."""
        real_C = {name: x for name, x in message.tensors.items() if x.is_floating_point()}
        if not real_C:
            return message
        most, exact_C = self.clip.max_norm, {name: x.double() for name, x in real_C.items()}
        norm_C = trees.norm_C(exact_C)
        if bool((norm_C <= most * (1 + SLACK)).all()):
            return message
        coarsest = max(torch.finfo(x.dtype).eps for x in real_C.values())
        below = most if coarsest < SLACK else most * (1 - coarsest)
        factor_C = torch.where(norm_C <= most * (1 + SLACK), 1.0, below / norm_C)
        cut_C = {
            name: (x * factor_C.to(x).view(-1, *[1] * (x.dim() - 1))).to(real_C[name]) for name, x in exact_C.items()
        }
        return replace(message, tensors={**message.tensors, **cut_C})

    def on_total(
        self, change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
    ) -> tuple[Shared, dict[str, float], Tree]:
        """The change as it is."""
        return change, {}, {}
