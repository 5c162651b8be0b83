"""A transform that has a total half alone: seeded noise on the mean change, whose state counts its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property


@final
@dataclass(frozen=True, slots=True)
class Noise:
    """Normal noise of this scale over the number of clients, on every tensor that moves."""

    scale: float
    name: str = "noise"
    key: str = "wire.noise"
    needs: tuple[Need, ...] = ()
    lacks: frozenset[Property] = frozenset()

    def declared(self, expected: Expected) -> Expected:
        return expected

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        return message, {}

    @property
    def measures(self) -> tuple[str, ...]:
        return ()

    def on_arrival(self, message: Message, expected: Expected, state: Tree) -> Message:
        return message

    def on_total(
        self, change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
    ) -> tuple[Shared, dict[str, float], Tree]:
        rounds = int(state["rounds"]) + 1 if state else 1
        draw = torch_generator(seed, "noise")
        moved = {
            name: x + (torch.randn(x.shape, generator=draw) * self.scale / clients).to(x)
            for name, x in sorted(change.trainable.items())
        }
        return replace(change, trainable=moved), {"noise.rounds": float(rounds)}, {"rounds": torch.tensor(rounds)}
