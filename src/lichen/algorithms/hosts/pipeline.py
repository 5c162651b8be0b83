"""Trains one model over hosts that hold a piece of it each: tokens go to the first, labels to the last.

What walks between hosts goes through whoever runs this: a host's question carries its output, and the answer of its
neighbour brings it on. A round is some optimizer steps over rows of the invited clients; each step's rows are cut into
micro-batches. The adapter and the optimizer's state of every piece come back at the round's end, so that a host that is
lost costs no more than the round: it is repeated, by whoever takes the host's place, and ends with the same bytes.

Beside the round's own seconds it counts a *virtual* time, from the seconds that each host says it worked and from what
waits for what, as if every host had a machine of its own: the share of it in which hosts wait is ``idle``.

References: those of :mod:`lichen.clients.pipeline.schedule`.

Legend: B rows, T tokens, H width, P trained tensors of a piece, S hosts, M micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.algorithms.hosts.mail import PIPELINE, Mail, Stage, stages_of, work_metrics
from lichen.algorithms.hosts.micro_batches import Rows, micro_batches, one_by_one, scoring
from lichen.algorithms.scores import is_validated, with_best
from lichen.clients.pipeline.host import PipelineHost
from lichen.clients.training.optimize import ClientOptimizer
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.checks import declared_fault, form_fault
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import Source
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Sampler
from lichen.core.errors import LichenError
from lichen.core.replies import Attendance, Refusal, Reply
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["PIPELINE", "Pipeline"]


@final
class _LostError(Exception):
    """A host could not go on."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """Rounds of training over hosts; an :class:`lichen.core.contracts.algorithm.Algorithm`.

    Attributes:
        host: What the hosts do; the same values as theirs.
        names: Of each host the tensors that it trains.
        sampler: Who is invited.
        weight_N: The clients' example counts.
        train: The clients' training batches.
        valid: Their validation rows, each once.
        steps: Optimizer steps of a round.
        micro: M.
        rounds: Rounds in all: the last is always validated.
        valid_every: Rounds between validations; validated are all clients.
        clip: The norm of a step's mean gradient at most; None: any.
        lr_scale: Factor on the learning rate in round r (from 0).
        tries: How often a round is begun before a host that is lost again ends the run.
        admission: What counts of the hosts' messages.
    """

    host: PipelineHost
    names: tuple[frozenset[str], ...]
    sampler: Sampler
    weight_N: Tensor
    train: Source
    valid: Source
    steps: int
    micro: int
    rounds: int
    valid_every: int = 1
    clip: float | None = None
    lr_scale: Callable[[int], float] = lambda _: 1.0
    tries: int = 3
    admission: Admission = field(default_factory=Admission)

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round; the optimizer's is all hosts'."""
        optimizer: ClientOptimizer = self.host.optimizer
        moments_C = optimizer.init({name: x[None] for name, x in shared.trainable.items()})
        return ServerState(round=0, shared=shared, optimizer={name: x[0] for name, x in moments_C.items()})

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round, begun again where a host is lost.

        Raises:
            LichenError: if a host is lost as often as a round is tried, what it said last.
        """
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        clients, steps = self.sampled(seed)
        _, stages, lost = self._tried(engine, state, self.training(state.round), seed, steps)
        metrics = work_metrics(stages)
        trainable, optimizer = dict(state.shared.trainable), dict(state.optimizer)
        for stage in stages:
            assert stage.end is not None
            for name, x_C in stage.end.tensors.items():
                (trainable if name in trainable else optimizer)[name] = x_C[0]
        state = replace(
            state, round=state.round + 1, shared=replace(state.shared, trainable=trainable), optimizer=optimizer
        )
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if is_validated(state.round, self.valid_every, self.rounds):
            sums = self.score(engine, state.shared, self.valid, range(len(self.weight_N)), version=state.round)
            if float(sums["count"].sum()):
                known = sums["count"] > 0
                value = float((sums["loss_sum"][known] / sums["count"][known]).mean())
                state, metrics = with_best(state, value, state.shared), {**metrics, "valid": value}
        hosts = range(len(self.names))
        report = Report(
            round=state.round,
            clients=clients,
            metrics=metrics,
            tokens=sum(int(micro["length_B"].sum()) for step in steps for micro in step),
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - start,
            valid_up=engine.bytes_up - trained_up,
            valid_down=engine.bytes_down - trained_down,
            attendance=Attendance.of(hosts, hosts, lost),
        )
        return state, report

    def sampled(self, seed: int) -> tuple[tuple[int, ...], list[list[Rows]]]:
        """Who is invited to a round, and the micro-batches of each of its steps."""
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        each = [list(self.train.batches([client], seed)) for client in clients]
        rows = [[dict(batches[at]) for batches in each if at < len(batches)] for at in range(self.steps)]
        return clients, [micro_batches(batches, self.micro) for batches in rows]

    def training(self, round_: int) -> dict[str, float]:
        """Settings of the jobs of a round, counted from 0."""
        return {"steps": self.steps, "micro": self.micro, "train": 1.0, "lr_scale": self.lr_scale(round_)}

    def score(
        self, engine: Engine, shared: Shared, source: Source, clients: Sequence[int], *, version: int = 0
    ) -> Tree:
        """``loss_sum`` and ``count`` ``(N,)`` float64 over each of these clients' rows, with these tensors.

        Raises:
            LichenError: as :meth:`round`.
        """
        micros, whose = one_by_one(source, clients)
        sums = {name: torch.zeros(len(clients), dtype=torch.float64) for name in ("loss_sum", "count")}
        if not micros:
            return sums
        state = ServerState(round=version, shared=shared)
        losses = self._tried(engine, state, scoring(len(micros)), 0, [micros])[0].losses
        for at, place in enumerate(whose):
            sums["loss_sum"][place] += losses[at]["loss_B"][0].double().sum()
            sums["count"][place] += losses[at]["count_B"][0].double().sum()
        return sums

    def _tried(
        self, engine: Engine, state: ServerState, settings: dict[str, float], seed: int, steps: Sequence[Sequence[Rows]]
    ) -> tuple[Mail, list[Stage], list[Refusal]]:
        """All hosts' work, begun again where one is lost; and who was.

        Raises:
            LichenError: if a host is lost as often as this is tried, what it said last.
        """
        lost = list[Refusal]()
        while True:
            stages = stages_of(self.host, self.names, state, settings, seed)
            try:
                return self._go(engine, stages, steps), stages, lost
            except _LostError as error:
                lost.append(error.refusal)
                if len(lost) >= self.tries:
                    raise error.refusal.error() from None

    def _go(self, engine: Engine, stages: list[Stage], steps: Sequence[Sequence[Rows]]) -> Mail:
        """Bring every output to the neighbour that waits for it, until all hosts have come to their end."""
        mail = Mail(steps, self.clip, [sorted(stage.job.shared.trainable) for stage in stages])
        numbers = {engine.submit(stage.job): place for place, stage in enumerate(stages)}
        try:
            while any(stage.end is None for stage in stages):
                came = False
                for reply in engine.replies([n for n, place in numbers.items() if stages[place].end is None]):
                    came = True
                    self._receive(numbers[reply.job], stages, reply, mail)
                    for number, place in numbers.items():
                        answer = mail.answer(place, stages[place]) if stages[place].waits else None
                        if answer is not None:
                            stages[place].waits = False
                            engine.answer(number, (place,), answer)
                if not came:
                    raise _LostError(Refusal(client=-1, reason="error", what="the hosts wait for one another"))
        finally:
            for number in numbers:
                engine.cancel(number)
        return mail

    def _receive(self, place: int, stages: Sequence[Stage], reply: Reply, mail: Mail) -> None:
        """Take what a host says.

        Raises:
            _LostError: if it cannot go on, or says something else than its work declares.
        """
        stage, message = stages[place], reply.message
        if message is None:
            what = reply.error or LichenError("nothing came", where=f"host {place}")
            raise _LostError(Refusal(client=place, reason=reply.reason, what=what.what, where=what.where, fix=what.fix))
        asks = reply.question
        if asks != (stage.questions < len(stage.turns)):
            raise _LostError(Refusal(client=place, reason="turn", what="asks one time too many, or ends too early"))
        expected = stage.expected[stage.questions] if asks else self.host.expected(stage.job)
        fault = form_fault(message) or declared_fault(message, expected)
        if fault is None and (message.client_C.tolist(), message.version_C.tolist()) != ([place], [stage.job.version]):
            fault = "version", "was made in another's name, or for another version"
        if fault is not None:
            raise _LostError(Refusal(client=place, reason=fault[0], what=fault[1], where=f"host {place}"))
        seconds = float(message.metrics["seconds"][0])
        stage.busy += seconds
        stage.then += seconds
        if not asks:
            stage.end = message
            return
        turn = stage.turns[stage.questions]
        step = stage.questions // (len(stage.turns) // len(mail.steps))
        stage.questions += 1
        mail.put(place, step, turn, message, stage.then)
        stage.want, stage.waits = None if turn.wants is None else (step, turn.wants), True
