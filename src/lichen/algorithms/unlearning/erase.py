"""FedEraser: builds a model again from every n-th round that a run retained, calibrated, without a client's messages.

The first round that is used is folded as it was sent, without the client: all had begun from the same tensors. In each
one after that, the others that took part then train a few steps from the model as it is now; their change gives the
direction, the one they sent in the run the length (:mod:`lichen.server.unlearning.calibrated`). Rounds in between are
left out, so that the model takes fewer steps than the run's; it is an approximation of a model that never met the
client, and nobody can say how close it is without training that one.

References:
    Gaoyang Liu, Xiaoqiang Ma, Yang Yang, Chen Wang and Jiangchuan Liu. "FedEraser: Enabling Efficient Client-Level
    Data Removal from Federated Learning Models." IWQoS 2021. https://doi.org/10.1109/IWQOS52092.2021.9521274
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import final

from lichen.algorithms.average import Average
from lichen.algorithms.unlearning.others import judges_but
from lichen.core.collecting.history import History
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.server.unlearning.calibrated import Calibrated
from lichen.server.unlearning.invited import Fixed

__all__ = ["Erase"]


@final
@dataclass(frozen=True, slots=True)
class Erase:
    """Calibrated rounds; the state's number jumps from one that is used to the next, and ends at ``average.rounds``.

    Args:
        average: The run's rounds; its work trains the few steps of a calibration.
        history: What the clients sent in them.
        gone: Clients whose messages are left out, and who are not asked for anything.
        every: Rounds from one that is used to the next; 1: all of them.

    Raises:
        LichenError: if ``every`` is not positive.
    """

    average: Average
    _: KW_ONLY
    history: History
    gone: frozenset[int]
    every: int = 2

    def __post_init__(self) -> None:
        if self.every < 1:
            raise LichenError(f"{self.every} is too few", where="erase.every", fix="use 1 or more")

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round, from the tensors that the run began from."""
        return self.average.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One of the rounds that are used, judged by the others."""
        number = state.round
        others = [client for client in self.history.clients(number) if client not in self.gone]
        average = replace(
            self.average, sampler=Fixed(others), validators=judges_but(self.average, self.gone), valid_every=1
        )
        if number:
            average = replace(average, aggregator=Calibrated(average.aggregator, history=self.history, round=number))
        else:
            state, average = self._first(state, others), replace(average, sampler=Fixed())
        state, report = average.round(state, engine, seed)
        return replace(state, round=min(number + self.every, self.average.rounds)), report

    def _first(self, state: ServerState, others: list[int]) -> ServerState:
        """The step of the first round by the others' own messages; every rank reads all of them."""
        average = self.average
        total = average.aggregator.zero()
        for message, _ in self.history.messages(others, (state.round,)):
            total = average.aggregator.add(total, message)
        if not average.aggregator.clients(total):
            return state
        change, _ = average.aggregator.close(total, average.clients_start(state))
        shared, optimizer = average.optimizer.update(change, state.optimizer, state.shared)
        return replace(state, shared=shared, optimizer=optimizer)
