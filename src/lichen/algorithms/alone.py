"""Trains every client alone, with its own best round: the baseline for what joining is worth.

The same client work as in the federation, with private adapters and private optimizer state that
never leave. A client that holds everybody's rows is the pooled column: what no one may do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

from lichen.algorithms.scores import is_validated, mean_loss, score, with_best
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.wire.shared import Shared

__all__ = ["Alone"]


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
    """

    clients: int
    rounds: int
    work: str = "train"
    valid: str = "valid"
    valid_every: int = 1
    lr_scale: Callable[[int], float] = lambda _: 1.0
    base: str = ""
    admission: Admission = OPEN

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        return ServerState(round=0, shared=shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round of everybody's private training. Nothing is sent, so no bytes are reported."""
        start, everyone = time.perf_counter(), tuple(range(self.clients))
        job = Job(
            work=self.work,
            shared=state.shared,
            version=2 * state.round,
            clients=everyone,
            seed=seed,
            base=self.base,
            settings={"lr_scale": self.lr_scale(state.round)},
        )
        _, trained = score(engine, job, self.admission)
        metrics = {"loss": float(trained["loss_sum"].sum() / trained["count"].sum().clamp(min=1))}
        done = state.round + 1
        if is_validated(done, self.valid_every, self.rounds):
            judging = replace(job, work=self.valid, version=2 * state.round + 1)
            metrics["valid"] = mean_loss(score(engine, judging, self.admission)[1])
            state = with_best(replace(state, round=done), metrics["valid"], Shared())
        state = replace(state, round=done)
        return state, Report(
            round=done,
            clients=everyone,
            metrics=metrics,
            tokens=int(trained["tokens"].sum()),
            bytes_up=0,
            bytes_down=0,
            seconds=time.perf_counter() - start,
        )
