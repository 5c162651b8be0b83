"""FedALT: each client trains its own low-rank adapter on and on, beside the frozen mean of all others'.

No client ever begins at the mean. Its model adds ``g1(x) s B' A' x`` of the rest of the world, which stands still in a
round, and ``g2(x) s B A x`` of its own; the two numbers are a softmax of ``G x``, in every layer and for every token,
and G is trained with the own adapter and stays at home.

A client sends how its adapter differs from the shared tensors, so that these become the mean ``M`` of the round's
adapters. From it every client takes its own part away, ``(M - theta / P) / (1 - 1 / P)`` for P clients in a round, and
has the rest of the world: the server needs the sum alone. Who was not in the last round takes all of ``M``. Where some
of those invited did not answer, a little of the own part stays in it.

A finished model has the rest of the world that it was trained beside. What is no adapter, such as a head, is each
client's own. Gates begin at zero, so that both adapters count one half; in the paper they are drawn.

References:
    Jieming Bian, Lei Wang, Letian Zhang and Jie Xu. "FedALT: Federated Fine-Tuning Through Adaptive Local
    Training with Rest-of-World LoRA." AAAI 2026. https://arxiv.org/abs/2503.11880

Legend: C clients, P clients of a round, i in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.personal.pair import OTHER, Paired, is_factor, pair_of
from lichen.clients.personal.training import MINE, own_training
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["FedAlt", "FedAltModels", "adapters_and_gates"]

_GATE = "lora_gate"
_ROUND = "round"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedAltState:
    """The own adapter and its gates in training, and the rest of the world beside them; ``mine_C`` as it came."""

    work: Train
    own: TrainState
    shared_C: Tree
    other_C: Tree
    mine_C: Tree
    rest: Tree


@final
@dataclass(frozen=True, slots=True)
class FedAlt:
    """FedALT's training as a client work.

    Args:
        train: Plain local training, whose steps these are.
        cohort: P, clients in a round.
    """

    train: Train
    cohort: int

    def expected(self, job: Job) -> Expected:
        """The plain training's: one tensor for each that is shared."""
        return self.train.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FedAltState:
        """The own adapter and gates where they were left, at first the shared one and zeros; raises as the training."""
        mine_C, rest = trees.split(own_C or {}, MINE)
        shared, count = job.shared.trainable, len(clients)
        gates = {_gate(name): x.new_zeros(2, x.shape[1]) for name, x in shared.items() if name.endswith("lora_A")}
        work = replace(own_training(self.train), model=Paired(self.train.model, None))
        round_C, trained_C = mine_C.get(_ROUND), trees.split(mine_C, OTHER)[1]
        trained_C.pop(_ROUND, None)
        with_gates = replace(job, shared=replace(job.shared, trainable={**shared, **gates}))
        own = work.init(with_gates, clients, trained_C or None)
        shared_C = trees.expand(shared, count)
        factors_C = {name: x_C for name, x_C in shared_C.items() if is_factor(name)}
        other_C = self._rest_of_world(factors_C, own.params_C, round_C, job.version)
        own = replace(own, frozen_C=trees.join(OTHER, other_C, own.frozen_C))
        return FedAltState(work=work, own=own, shared_C=shared_C, other_C=other_C, mine_C=mine_C, rest=rest)

    def _rest_of_world(self, mean_C: Tree, own_C: Tree, round_C: Tensor | None, version: int) -> Tree:
        """The mean without the clients' own part, of those that were in the last round."""
        if round_C is None:
            return mean_C
        part = 1.0 / self.cohort
        was_C = round_C + 1 == version
        return {
            name: torch.where(was_C.to(x_C.device).view(-1, 1, 1), (x_C - part * own_C[name]) / (1.0 - part), x_C)
            for name, x_C in mean_C.items()
        }

    def step(self, state: FedAltState, batch: Batch) -> FedAltState:
        """One step of the own adapter and its gates."""
        return replace(state, own=state.work.step(state.own, batch))

    def final(self, state: FedAltState) -> tuple[Message, Tree | None]:
        """How the own adapters differ from the shared tensors; and all that is retained.

        A client whose loss or tensors are not finite sends weight 0 and zeros, and keeps what it had.
        """
        message, retained_C = state.work.final(state.own)
        mine_C, finite_C = dict(retained_C or {}), message.metrics["failed"] == 0
        params_C, _ = trees.split(mine_C, "params/")
        tensors = {
            name: torch.where(_per(finite_C, x_C), params_C[name] - x_C, torch.zeros_like(x_C))
            for name, x_C in state.shared_C.items()
        }
        before_C, _ = trees.split(state.mine_C, OTHER)
        other_C = {
            name: torch.where(_per(finite_C, x_C), x_C, before_C.get(name, x_C)) for name, x_C in state.other_C.items()
        }
        never_C = torch.full_like(message.version_C, -2)
        round_C = torch.where(finite_C.cpu(), message.version_C, state.mine_C.get(_ROUND, never_C).cpu())
        retained = {**trees.join(OTHER, other_C, mine_C), _ROUND: round_C}
        return replace(message, tensors=tensors), trees.join(MINE, retained, state.rest)


@final
@dataclass(frozen=True, slots=True)
class FedAltModels:
    """What clients of FedALT are scored with: their own adapters beside the rest of the world, by their gates."""

    def model(self, shared: Tree, mine_C: Tree) -> Tree:
        """The own adapters."""
        return adapters_and_gates(mine_C)[0]

    def form(self, shared: Tree, params_C: Tree, own_C: Tree) -> Tree:
        """The pairs with their gates; of clients that have none yet, the shared model."""
        mine_C, _ = trees.split(own_C, MINE)
        other_C, _ = trees.split(mine_C, OTHER)
        if not other_C:
            return params_C
        return pair_of(other_C, {**params_C, **adapters_and_gates(mine_C)[1]})


def adapters_and_gates(mine_C: Tree) -> tuple[Tree, Tree]:
    """The own adapters with all else that is trained of the model, and their gates, out of what clients have kept."""
    trained_C, _ = trees.split(mine_C, "params/")
    gates_C = {name: x_C for name, x_C in trained_C.items() if name.endswith(_GATE)}
    return {name: x_C for name, x_C in trained_C.items() if name not in gates_C}, gates_C


def _gate(name: str) -> str:
    return f"{name.removesuffix('lora_A')}{_GATE}"


def _per(flag_C: Tensor, x_C: Tensor) -> Tensor:
    return flag_C.to(x_C.device).view(-1, *[1] * (x_C.dim() - 1))
