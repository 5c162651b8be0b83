"""Trains every client alone, with its own best round: the baseline for what joining is worth.

The same client work as in the federation, with private adapters and private optimizer state that
never leave. A client that holds everybody's rows is the pooled column: what no one may do.

:class:`UntilBest` has no budget of rounds: a client goes on until its own validation loss has not fallen for some
validations, and is asked no more from then on.

References:
    Lutz Prechelt. "Early Stopping - But When?" Neural Networks: Tricks of the Trade, Springer 1998.

Legend: A clients asked, N clients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.algorithms.scores import is_validated, mean_loss, score, with_best
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["Alone", "UntilBest"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """Rounds of private training; validation marks each client's best, and in the state the best round on average.

    Versions run twice as fast as rounds: training makes an odd one, keeping the best the next.

    Attributes:
        clients: How many, all in every round.
        rounds: Rounds in all: the last is always validated.
        work: Private training.
        valid: Private validation that keeps the best.
        valid_every: Rounds between validations.
        lr_scale: Factor on the learning rate in round r (from 0).
        base: Digest of the frozen base model.
        admission: What counts of what clients send.
        deadline: Seconds that a round waits at most for its clients.
        scoring: Seconds that its validation waits at most.
    """

    clients: int
    rounds: int
    work: str = "train"
    valid: str = "valid"
    valid_every: int = 1
    lr_scale: Callable[[int], float] = lambda _: 1.0
    base: str = ""
    admission: Admission = OPEN
    deadline: float = math.inf
    scoring: float = math.inf

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        return ServerState(round=0, shared=shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round of everybody's private training. Nothing is sent, so no bytes are reported."""
        state, report, judged = self.one_round(state, engine, seed, tuple(range(self.clients)))
        if judged is None:
            return state, report
        value = mean_loss(judged)
        return with_best(state, value, Shared()), replace(report, metrics={**report.metrics, "valid": value})

    def one_round(
        self, state: ServerState, engine: Engine, seed: int, clients: tuple[int, ...]
    ) -> tuple[ServerState, Report, Tree | None]:
        """One round of these clients, and the metrics ``(A,)`` of their validation where the round has one."""
        start = time.perf_counter()
        job = Job(
            work=self.work,
            shared=state.shared,
            version=2 * state.round,
            clients=clients,
            seed=seed,
            base=self.base,
            settings={"lr_scale": self.lr_scale(state.round)},
        )
        _, trained = score(engine, job, self.admission, within=self.deadline)
        loss = float(trained["loss_sum"].sum() / trained["count"].sum().clamp(min=1)) if trained else math.nan
        done, judged = state.round + 1, None
        if is_validated(done, self.valid_every, self.rounds):
            judging = replace(job, work=self.valid, version=2 * state.round + 1)
            judged = score(engine, judging, self.admission, within=self.scoring)[1] or None
        report = Report(
            round=done,
            clients=clients,
            metrics={"loss": loss},
            tokens=int(trained["tokens"].sum()) if trained else 0,
            bytes_up=0,
            bytes_down=0,
            seconds=time.perf_counter() - start,
        )
        return replace(state, round=done), report, judged


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class UntilBest:
    """Rounds of private training without a budget: each client stops when it has stopped gaining.

    The state holds the round of every client's last gain (``gained_N``) and its least validation loss (``least_N``,
    infinite before the first), from which alone it follows who goes on. The loss that a round reports as ``valid`` is
    the mean of ``least_N``, which those who have stopped belong to.

    Args:
        alone: The rounds of everybody.
        patience: Validations without a gain after which a client stops.
        rounds_N: Rounds of each client at most.
        warmup: Rounds after which patience begins to count.
    """

    alone: Alone
    patience: int
    rounds_N: tuple[int, ...]
    warmup: int = 0

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        count = self.alone.clients
        gains: Tree = {
            "gained_N": torch.zeros(count, dtype=torch.int64),
            "least_N": torch.full((count,), torch.inf, dtype=torch.float64),
        }
        return replace(self.alone.init(shared), optimizer=gains)

    def training(self, state: ServerState) -> tuple[int, ...]:
        """The clients that go on after this state; none: everybody has stopped."""
        every = self.alone.valid_every
        gained_N = state.optimizer["gained_N"].clamp(min=self.warmup)
        patient_N = state.round // every - gained_N // every < self.patience
        allowed_N = torch.tensor(self.rounds_N, dtype=torch.int64) > state.round
        return tuple(torch.nonzero(patient_N & allowed_N).flatten().tolist())

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round of those who go on. Nothing is sent, so no bytes are reported."""
        clients = self.training(state)
        state, report, judged = self.alone.one_round(state, engine, seed, clients)
        if judged is None:
            return state, report
        gains = _gained(state.optimizer, torch.tensor(clients), judged, state.round)
        known = gains["least_N"].isfinite()
        value = float(gains["least_N"][known].mean())
        state = with_best(replace(state, optimizer=gains), value, Shared())
        return state, replace(report, metrics={**report.metrics, "valid": value})


def _gained(gains: Tree, client_A: Tensor, judged: Tree, round_: int) -> Tree:
    """The losses and rounds of the last gains; who has no validation rows gains nothing."""
    least_A, count_A = gains["least_N"][client_A], judged["count"]
    value_A = torch.where(count_A > 0, judged["loss_sum"] / count_A.clamp(min=1), torch.inf)
    gained_A = torch.where(value_A < least_A, round_, gains["gained_N"][client_A])
    return {
        "gained_N": gains["gained_N"].index_copy(0, client_A, gained_A),
        "least_N": gains["least_N"].index_copy(0, client_A, torch.minimum(value_A, least_A)),
    }
