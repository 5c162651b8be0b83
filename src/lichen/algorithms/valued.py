"""Rounds of averaging that say what each client's message contributed.

Nothing of a round changes: clients train, the server averages, steps and validates as it would. Its messages are
retained until it is over. Then the server closes the round again for some coalitions of clients
(:mod:`lichen.server.value.coalitions`), asks what loss the model would have that they alone would have made, and shares
the loss out (:mod:`lichen.server.value.game`). Nobody trains again.

Kinds of values:

=========  =====================================================================  ===========================
kind       what is asked                                                          single messages
=========  =====================================================================  ===========================
``exact``  the loss of every coalition                                            are needed
``gtg``    the loss of coalitions along guided walks                              are needed
``loo``    the loss without each client                                           are needed
``first``  one gradient of the loss, a sum over rows; p_k ⟨Δ_k, −∇L(w)⟩           or each client for itself
=========  =====================================================================  ===========================

Where the server sees no single message, it sends the gradient to those whose messages are in the sum; each computes its
value, keeps it, and answers with nothing (:mod:`lichen.clients.evaluation.own_value`). The server knows what the values
add up to, ⟨Δ, −∇L(w)⟩ of its own step, before anybody has computed one.

The loss is that of all rows together, the server's own public ones or those that clients validate on: a sum of losses
over a number of rows. A client that is asked and does not answer leaves the round without values, since coalitions that
were judged by other rows do not compare.

References: those of the two modules named above.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

from lichen.algorithms.average import Average
from lichen.algorithms.judges import AbsentError, Judges
from lichen.clients.evaluation.own_value import SHARE
from lichen.core import tree as trees
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.collecting.history import History
from lichen.core.collecting.round_messages import RoundMessages
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.value import RoundValue
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.value.coalitions import Coalitions, Denominator
from lichen.server.value.first_order import first_order_C, slope
from lichen.server.value.game import exact, guided, leave_one_out

__all__ = ["Kind", "Valued"]

Kind = Literal["exact", "gtg", "first", "loo"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Valued:
    """Rounds of averaging whose clients are valued.

    Attributes:
        rounds: The rounds.
        kind: How values are found.
        of: The denominator of coalitions.
        every: Rounds from one that is valued to the next.
        spill: Folder of the messages of a round that memory does not hold; nothing stays in it.
        judges: Clients whose rows say what the utility of a coalition is.
        admission: What counts of their answers.
        server: Holds the server's own rows in place of theirs, as its client 0; None: they are at the clients.
        memory: Bytes of messages that memory holds.
        score: The work that sums losses.
        gradient: The work that takes their gradient.
        own_work: By which a client values itself, for ``first``; empty: the server does it, by single messages.
    """

    rounds: Average
    kind: Kind
    of: Denominator = "cohort"
    every: int = 1
    spill: Path
    judges: tuple[int, ...]
    admission: Admission
    server: Engine | None = None
    memory: int = 1 << 29
    score: str = "valid"
    gradient: str = "gradient"
    own_work: str = ""

    def init(self, shared: Shared) -> ServerState:
        """As the rounds'."""
        return self.rounds.init(shared)

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round; its report has ``value``, the metric ``value_seconds``, and the bytes of judging as validation."""
        if (state.round + 1) % self.every:
            return self.rounds.round(state, engine, seed)
        if self.own_work:
            after, report = self.rounds.round(state, engine, seed)
            if report.metrics.get("skipped") or "weight" not in report.metrics:
                return after, report
            return after, self._timed(report, engine, lambda: self._private(state, after, report, engine))
        messages = RoundMessages(History(self.spill), memory=self.memory, history=self.rounds.history)
        try:
            after, report = replace(self.rounds, history=messages).round(state, engine, seed)
            if not messages.clients:
                return after, report
            judges, draws = self._judges(state, engine), derive(seed, "value")
            return after, self._timed(report, engine, lambda: self._value(state, messages, judges, draws))
        finally:
            messages.clear()

    def _timed(self, report: Report, engine: Engine, find: Callable[[], RoundValue | None]) -> Report:
        """The report with the values, and what finding them took."""
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        try:
            value = find()
        except AbsentError:
            value = None
        seconds, up, down = time.perf_counter() - start, engine.bytes_up - up, engine.bytes_down - down
        return replace(
            report,
            value=value,
            metrics={**report.metrics, "value_seconds": seconds},
            seconds=report.seconds + seconds,
            bytes_up=report.bytes_up + up,
            bytes_down=report.bytes_down + down,
            valid_up=report.valid_up + up,
            valid_down=report.valid_down + down,
        )

    def _value(self, state: ServerState, messages: RoundMessages, judges: Judges, seed: int) -> RoundValue | None:
        """What each client contributed.

        Raises:
            AbsentError: if a judge did not answer.
        """
        rounds = self.rounds
        coalitions = Coalitions(
            messages=messages,
            aggregator=rounds.aggregator,
            start=rounds.clients_start(state),
            step=lambda change: rounds.optimizer.update(change, state.optimizer, state.shared)[0],
            of=self.of,
        )

        def utility(coalition: frozenset[int]) -> float:
            return judges.utility(coalitions.shared(coalition))

        players = coalitions.players
        if self.kind == "exact":
            return exact(players, utility)
        if self.kind == "gtg":
            return guided(players, utility, seed=seed)
        if self.kind == "loo":
            return leave_one_out(players, utility)
        before, gradient = judges.gradient(state.shared)
        value = self._first(messages, coalitions, gradient)
        return RoundValue(value=value, before=before, after=utility(frozenset(players)), evaluations=1)

    def _first(self, messages: RoundMessages, coalitions: Coalitions, gradient: Tree) -> dict[int, float]:
        """Values to first order: of a mean and plain steps from the messages themselves, as clients find them."""
        mean, optimizer = self.rounds.aggregator, self.rounds.optimizer
        if not isinstance(mean, Mean) or not isinstance(optimizer, ServerSGD):
            return coalitions.slopes(gradient)
        total, each = mean.zero(), {client: messages.message(client) for client in messages.clients}
        for message in each.values():
            total = mean.add(total, message)
        share = optimizer.stride / mean.close(total, coalitions.start)[1]["weight"]
        return {
            client: first_order_C(message, gradient, weighting=mean.weighting, share=share)[0]
            for client, message in each.items()
        }

    def _private(self, state: ServerState, after: ServerState, report: Report, engine: Engine) -> RoundValue:
        """What all contributed together; each of those who are in the sum is told what it takes to find its own.

        Raises:
            AbsentError: if no judge answers.
        """
        rounds, judges = self.rounds, self._judges(state, engine)
        assert isinstance(rounds.optimizer, ServerSGD), "a recipe with others is refused"
        before, gradient = judges.gradient(state.shared)
        in_sum = sorted({one.client for one in report.attendance.receipts if one.version == state.round})
        job = Job(
            work=self.own_work,
            shared=Shared(gradient),
            version=after.round,
            clients=tuple(in_sum),
            seed=0,
            base=rounds.base,
            settings={SHARE: rounds.optimizer.stride / report.metrics["weight"]},
        )
        collect(engine, [job], admission=rounds.admission)
        idle = Shared(trees.zeros_like(state.shared.trainable))
        unmoved = rounds.optimizer.update(idle, state.optimizer, state.shared)[0].trainable
        moves = {n: x.double() - unmoved[n].double() for n, x in after.shared.trainable.items()}
        known = None if self.server is None else judges.utility(after.shared)
        return RoundValue(value={}, before=before, after=known, evaluations=1, total=slope(moves, gradient))

    def _judges(self, state: ServerState, engine: Engine) -> Judges:
        """Those whose rows say what a coalition is worth."""
        return Judges(
            self.server or engine,
            self.judges if self.server is None else (0,),
            admission=self.admission,
            version=state.round,
            base=self.rounds.base,
            score=self.score,
            gradient=self.gradient,
            without_loss=bool(self.own_work) and self.server is None,
        )
