"""SemiFL: the server trains on its few labelled rows, the clients on pseudo-labels of that model.

SemiFL: clients hold no labels at all. What a client receives has just been fine-tuned on the server's own
labelled rows, and it labels the client's rows before any local step
(:class:`lichen.clients.training.fix_and_mix.FixAndMix`); the clients' models are averaged, and the
server fine-tunes the average before it is validated, kept or sent. The start is fine-tuned too.

The server trains on an engine of its own, with one client: itself. No byte of that crosses anything, and
none is counted. Its step is the second half of a server optimizer, so that codecs, capacities and
validation see one change a round; what it needs lies in the optimizer's state, and a run goes on after a
kill as if nothing had happened. A round to which nobody comes changes nothing; where all come and none is
sure of a single row, the server trains on from where it was.

References:
    Enmao Diao, Jie Ding and Vahid Tarokh. "SemiFL: Semi-Supervised Federated Learning for Unlabeled
    Clients with Alternate Training." NeurIPS 2022. https://arxiv.org/abs/2106.01432
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch

from lichen.algorithms.average import Average
from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import ServerOptimizer
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.allow_empty import AllowEmpty

__all__ = ["SemiFL"]

_ROUND, _LOSS = "server.round", "server.loss"


@final
@dataclass(frozen=True, slots=True)
class FineTuned:
    """A server optimizer, and after its step some training on the server's own rows.

    Args:
        optimizer: Steps with the clients' change.
        server: Runs ``work`` for client 0: a client task over the server's labelled rows.
        seed: Of the run.
        work: The server's training, whose message is a change of the shared tensors.
        base: Digest of the frozen base model.
        lr_scale: Factor on the server's learning rate in round r (from 0; the start is -1).
    """

    optimizer: ServerOptimizer
    _: KW_ONLY
    server: Engine
    seed: int
    work: str = "server"
    base: str = ""
    lr_scale: Callable[[int], float] = lambda _: 1.0

    def init(self, shared: Shared) -> Tree:
        """The optimizer's state, with the number of rounds fine-tuned and the last one's mean loss."""
        own = {_ROUND: torch.zeros((), dtype=torch.int64), _LOSS: torch.full((), torch.nan, dtype=torch.float64)}
        return {**self.optimizer.init(shared), **own}

    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after the clients' step and the server's own."""
        done = int(state[_ROUND])
        rest = {name: x for name, x in state.items() if name not in (_ROUND, _LOSS)}
        shared, rest = self.optimizer.update(change, rest, shared)
        shared, loss = self.tune(shared, done)
        return shared, {**rest, _ROUND: torch.tensor(done + 1), _LOSS: torch.tensor(loss, dtype=torch.float64)}

    def tune(self, shared: Shared, number: int) -> tuple[Shared, float]:
        """``(shared, mean loss)`` after training on the server's rows.

        Args:
            shared: Where it begins.
            number: Of the round; -1 before the first.

        Where its loss is not finite the tensors stay as they are, and the loss is NaN.

        Raises:
            LichenError: if the server has no row to learn from.
        """
        job = Job(
            work=self.work,
            shared=shared,
            version=max(number, 0),
            clients=(0,),
            seed=derive(self.seed, "server", number),
            base=self.base,
            settings={"lr_scale": self.lr_scale(number)},
        )
        (message,) = drain(self.server, job)
        if float(message.metrics["failed"].sum()):
            return shared, math.nan
        count = float(message.metrics["count"].sum())
        if not count:
            raise LichenError("the server has no labelled row", where="semi.kind", fix="give it some")
        before = shared.trainable
        moved = {name: before[name] + x[0].to(before[name]) for name, x in message.tensors.items()}
        return shared | Shared(moved), float(message.metrics["loss_sum"].sum()) / count


@final
@dataclass(frozen=True, slots=True)
class SemiFL:
    """Rounds of averaging with the server's own training after each.

    Args:
        clients: The clients' half; its work is the unlabelled clients'.
        server: As for :class:`FineTuned`.
        seed: Of the run.
        work: The server's training.
        lr_scale: As for :class:`FineTuned`.
        first: How many times the server trains before the first round; 0: clients begin at the start.

    Raises:
        LichenError: if clients are to make the start by themselves, which the server fine-tunes.
    """

    clients: Average
    _: KW_ONLY
    server: Engine
    seed: int
    work: str = "server"
    lr_scale: Callable[[int], float] = lambda _: 1.0
    first: int = 1

    def __post_init__(self) -> None:
        if self.clients.downlink.agreed and self.first:
            raise LichenError(
                "clients cannot make a start that the server has fine-tuned", where="semi", fix="send them the start"
            )

    @property
    def _averaged(self) -> Average:
        return replace(self.clients, aggregator=AllowEmpty(self.clients.aggregator), optimizer=self._tuned)

    @property
    def _tuned(self) -> FineTuned:
        return FineTuned(
            self.clients.optimizer,
            server=self.server,
            seed=self.seed,
            work=self.work,
            base=self.clients.base,
            lr_scale=self.lr_scale,
        )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, fine-tuned on the server's rows."""
        for time in range(self.first):
            shared, _ = self._tuned.tune(shared, time - self.first)
        return self._averaged.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round; the report also has ``server_loss``, the mean over the server's steps."""
        state, report = self._averaged.round(state, engine, seed)
        loss = float(state.optimizer[_LOSS])
        return state, replace(report, metrics={**report.metrics, "server_loss": loss})
