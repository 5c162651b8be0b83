"""Rounds in which each client trains a model of its own, and is paid in coordinates of the common change.

The server holds the clients' models: it has seen all they sent, and sends each its own, in a job by itself. After a
round, whose change is that of the recipe's rule, reputations and models follow (:mod:`lichen.server.fairness.cgsv`).
``shared`` is the model of who is always paid in full; its best validated round is the round whose models are kept.
A client that is missing in a round is not paid for it, and its model stays. Whoever validates is sent ``shared``, so
that these rounds are for simulations: somebody at a site could keep what it has not earned.

The reputations, the clients' models and those of the best round are the state of the downlink, so that a resumed run
goes on with them.

References: those of the module named above.

Legend: N clients of the roster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from lichen.algorithms.average import Average
from lichen.core import tree as trees
from lichen.core.collecting.history import History
from lichen.core.collecting.round_messages import RoundMessages
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.fairness.cgsv import cosine, reputations, rewarded, shares

__all__ = ["EachItsOwn", "Rewarded", "own_models"]

_NOW, _BEST, _REPUTATION = "now/", "best/", "reputation"


@final
@dataclass(frozen=True, slots=True)
class EachItsOwn:
    """A downlink by which each client is sent its own model to train, and all the server's to judge it.

    Its state has ``reputation`` ``(N,)``, the clients' models ``now/*`` and those of the best round, ``best/*``.
    """

    @property
    def agreed(self) -> bool:
        """The first tensors are sent, too."""
        return False

    def init(self, shared: Shared, clients: int, *, first: bool) -> Tree:
        """All begin from the server's tensors, with a reputation of 0."""
        models = trees.broadcast(shared.trainable, clients)
        zero_N = torch.zeros(clients, dtype=torch.float64)
        return {**trees.join(_NOW, models, {}), **trees.join(_BEST, models, {}), _REPUTATION: zero_N}

    def jobs(self, job: Job, state: Tree, *, whole: bool = False) -> tuple[Job, ...]:
        """A job for each client, over its own model."""
        if whole:
            return (job,)
        return _each(job, trees.split(state, _NOW)[0])

    def snapshot(self, shared: Shared, state: Tree) -> Shared:
        """The server's tensors."""
        return shared

    def acknowledge(self, job: Job, clients: Sequence[int], state: Tree) -> Tree:
        """The same state."""
        return state

    def advance(self, shared: Shared, state: Tree, seed: int) -> Tree:
        """The same state: models follow once the round's messages are known."""
        return state


def _each(job: Job, models_N: Tree) -> tuple[Job, ...]:
    return tuple(
        replace(job, clients=(client,), shared=replace(job.shared, trainable=trees.take(models_N, client)))
        for client in job.clients
    )


def own_models(job: Job, state: ServerState) -> tuple[Job, ...]:
    """A job for each of a job's clients, over its model of the best round, or of the last one where none was judged."""
    which = _BEST if state.best_round >= 0 else _NOW
    return _each(job, trees.split(state.downlink, which)[0])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """Rounds of averaging with rewards.

    Attributes:
        rounds: The rounds; their downlink is :class:`EachItsOwn`.
        beta: β: the larger, the more alike all are paid.
        spill: Folder of the messages of a round that memory does not hold; nothing stays in it.
        memory: Bytes of messages that memory holds.

    Raises:
        LichenError: if β is not a positive number.
    """

    rounds: Average
    beta: float = 1.0
    spill: Path
    memory: int = 1 << 29

    def __post_init__(self) -> None:
        shares(torch.zeros(1, dtype=torch.float64), self.beta)

    def init(self, shared: Shared) -> ServerState:
        """As the rounds', every client at the shared tensors."""
        rounds = self.rounds
        downlink = rounds.downlink.init(shared, len(rounds.weight_N), first=True)
        return replace(rounds.init(shared), downlink=downlink)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round, with the metrics ``paid.least`` and ``paid.mean``, of the shares of those who came."""
        messages = RoundMessages(History(self.spill), memory=self.memory, history=self.rounds.history)
        try:
            after, report = replace(self.rounds, history=messages).round(state, engine, seed)
            if not messages.clients:
                return after, report
            return self._paid(state, after, report, messages)
        finally:
            messages.clear()

    def _paid(
        self, state: ServerState, after: ServerState, report: Report, messages: RoundMessages
    ) -> tuple[ServerState, Report]:
        """The state with what each client has earned."""
        rounds, downlink = self.rounds, dict(after.downlink)
        total = rounds.aggregator.zero()
        for client in messages.clients:
            total = rounds.aggregator.add(total, messages.message(client))
        change = rounds.aggregator.close(total, rounds.clients_start(state))[0]
        sent = {client: trees.take(messages.message(client).tensors, 0) for client in messages.clients}
        found = {client: cosine(tensors, change.trainable) for client, tensors in sent.items()}
        downlink[_REPUTATION] = reputations(downlink[_REPUTATION], found)
        share_N = shares(downlink[_REPUTATION], self.beta)
        models_N = {name: x.clone() for name, x in trees.split(downlink, _NOW)[0].items()}
        for client, tensors in sent.items():
            model = trees.take(models_N, client)
            full = rounds.optimizer.update(change, state.optimizer, replace(state.shared, trainable=model))[0].trainable
            own = {name: x + tensors[name].to(x) if name in tensors else x for name, x in model.items()}
            for name, x in rewarded(change.trainable, full, own, float(share_N[client])).items():
                models_N[name][client] = x
        downlink |= trees.join(_NOW, models_N, {})
        if after.best_round == after.round:
            downlink |= trees.join(_BEST, models_N, {})
        paid = [float(share_N[client]) for client in sent]
        metrics = {"paid.least": min(paid), "paid.mean": sum(paid) / len(paid)}
        return replace(after, downlink=downlink), replace(report, metrics={**report.metrics, **metrics})
