"""Asks clients, or the server's own rows, for the loss of a model and its gradient, always the same ones.

Coalitions that were judged by other rows do not compare. So those who answer first are asked from then on, and where
one of them does not answer there is no answer at all.
"""

from __future__ import annotations

import math
from typing import final

from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.value.first_order import GRADIENTS

__all__ = ["AbsentError", "Judges"]


@final
class AbsentError(Exception):
    """A judge did not answer, or no judge has a labelled row."""


@final
class Judges:
    """Those whose rows say what a model is worth, in one round.

    Args:
        engine: Reaches them.
        clients: Who is asked at first.
        admission: What counts of their answers.
        version: The round.
        base: The foundation model's digest.
        score: The work that sums losses.
        gradient: The work that takes their gradient.
        without_loss: They tell a sum of gradients and no loss.
    """

    def __init__(
        self,
        engine: Engine,
        clients: tuple[int, ...],
        *,
        admission: Admission,
        version: int,
        base: str,
        score: str,
        gradient: str,
        without_loss: bool,
    ) -> None:
        self._engine, self._clients, self._admission = engine, clients, admission
        self._version, self._base = version, base
        self._score, self._gradient, self._without_loss = score, gradient, without_loss
        self._first = True

    def utility(self, shared: Shared) -> float:
        """Minus the mean loss over all rows.

        Raises:
            AbsentError: if somebody does not answer who did before, or nobody has a labelled row.
        """
        return _utility(self._ask(self._score, shared))

    def gradient(self, shared: Shared) -> tuple[float | None, Tree]:
        """``(minus the mean loss over all rows, its gradient)``; no loss where they tell a sum of gradients alone.

        Raises:
            AbsentError: if somebody does not answer.
        """
        came = self._ask(self._gradient, shared, GRADIENTS)
        if not GRADIENTS.clients(came.total):
            raise AbsentError
        return None if self._without_loss else _utility(came), GRADIENTS.close(came.total, shared)[0].trainable

    def _ask(self, work: str, shared: Shared, aggregator: Aggregator | None = None) -> Collected:
        job = Job(
            work=work,
            shared=shared.for_model,
            version=self._version,
            clients=self._clients,
            seed=0,
            base=self._base,
        )
        came = collect(self._engine, [job], aggregator, admission=self._admission)
        arrived = tuple(came.client_N.tolist())
        if self._first:
            self._clients, self._first = arrived, False
        if not arrived or arrived != self._clients:
            raise AbsentError
        return came


def _utility(came: Collected) -> float:
    """Minus the mean loss over all rows of those who came.

    Raises:
        AbsentError: if nobody has a labelled row.
    """
    count = math.fsum(came.metrics["count"].tolist()) if "count" in came.metrics else 0.0
    if not count:
        raise AbsentError
    return -math.fsum(came.metrics["loss_sum"].tolist()) / count
