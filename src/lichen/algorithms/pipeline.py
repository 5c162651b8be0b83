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

from lichen.algorithms.scores import is_validated, with_best
from lichen.clients.pipeline.host import MOMENTS, PipelineHost, job_turns
from lichen.clients.pipeline.schedule import Op, Turn
from lichen.clients.training.optimize import ClientOptimizer
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.checks import declared_fault, form_fault
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.client import Source
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Sampler
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.replies import Attendance, Refusal, Reply
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["PIPELINE", "Pipeline", "micro_batches"]

PIPELINE = "pipeline"
"""The name of the hosts' work in a job."""

WORKED = {"gone": torch.ones(1)}
"""The answer to a host that waits for nothing but that its output has come."""

Rows = dict[str, Tensor]
"""One micro-batch: ``ids_BT`` and ``labels_BT``, int32, and ``length_B``, int64."""


def micro_batches(batches: Sequence[Rows], micro: int) -> list[Rows]:
    """One step's rows, cut into so many micro-batches of about equally many rows.

    Args:
        batches: With ``input_ids_CBT``, ``attention_mask_CBT`` and ``labels_CBT``; rows without tokens are dropped.
        micro: M. Where there are fewer rows, the rest are a row that teaches nothing.
    """
    ids, labels, lengths = list[Tensor](), list[Tensor](), list[int]()
    for batch in batches:
        width_CB = batch["attention_mask_CBT"].sum(-1) * batch["active_C"][:, None]
        for c, b in (width_CB > 0).nonzero().tolist():
            width = int(width_CB[c, b])
            ids.append(batch["input_ids_CBT"][c, b, :width])
            labels.append(batch["labels_CBT"][c, b, :width])
            lengths.append(width)
    if not ids:
        ids, labels, lengths = [torch.zeros(1, dtype=torch.int64)], [torch.full((1,), -100)], [1]
    while len(ids) < micro:
        ids.append(ids[0])
        labels.append(torch.full_like(labels[0], -100))
        lengths.append(lengths[0])
    parts = torch.tensor_split(torch.arange(len(ids)), micro)
    return [_laid(ids, labels, lengths, part.tolist()) for part in parts]


def _laid(ids: Sequence[Tensor], labels: Sequence[Tensor], lengths: Sequence[int], rows: Sequence[int]) -> Rows:
    width = -(-max(lengths[row] for row in rows) // 8) * 8
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int32)
    labels_BT = torch.full((len(rows), width), -100, dtype=torch.int32)
    for place, row in enumerate(rows):
        ids_BT[place, : lengths[row]], labels_BT[place, : lengths[row]] = ids[row].int(), labels[row].int()
    return {"ids_BT": ids_BT, "labels_BT": labels_BT, "length_B": torch.tensor([lengths[row] for row in rows])}


def labelled(micro: Rows) -> int:
    """How many next tokens of a micro-batch have a label."""
    return int((micro["labels_BT"][:, 1:] != -100).sum())


@final
class _LostError(Exception):
    """A host could not go on."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


@final
@dataclass(slots=True)
class _Stage:
    """How far one host has come.

    Attributes:
        job: What it does.
        turns: Its questions.
        expected: What each must be.
        questions: How many have come.
        want: What it waits for now; None: it works, or nothing was wanted.
        waits: It waits for an answer.
        then: Virtual seconds at which it is free.
        busy: Seconds that it worked.
        end: Its message, once it has come.
    """

    job: Job
    turns: list[Turn]
    expected: list[Expected]
    questions: int = 0
    want: tuple[int, Op] | None = None
    waits: bool = False
    then: float = 0.0
    busy: float = 0.0
    end: Message | None = None


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
        clients = self.sampler.invite(self.weight_N, derive(seed, "invite"))
        each = [list(self.train.batches([client], seed)) for client in clients]
        steps = [
            micro_batches([dict(batches[at]) for batches in each if at < len(batches)], self.micro)
            for at in range(self.steps)
        ]
        settings = {"steps": self.steps, "micro": self.micro, "train": 1.0, "lr_scale": self.lr_scale(state.round)}
        lost, found = list[Refusal](), None
        while found is None:
            try:
                found = self._go(engine, self._jobs(state, settings, seed), steps)
            except _LostError as error:
                lost.append(error.refusal)
                if len(lost) >= self.tries:
                    raise error.refusal.error() from None
        stages, metrics = found
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

    def score(
        self, engine: Engine, shared: Shared, source: Source, clients: Sequence[int], *, version: int = 0
    ) -> Tree:
        """``loss_sum`` and ``count`` ``(N,)`` float64 over each of these clients' rows, with these tensors.

        Raises:
            LichenError: as :meth:`round`.
        """
        micros, whose = list[Rows](), list[int]()
        for place, client in enumerate(clients):
            for batch in source.batches([client], 0):
                micros += micro_batches([dict(batch)], 1)
                whose.append(place)
        sums = {name: torch.zeros(len(clients), dtype=torch.float64) for name in ("loss_sum", "count")}
        if not micros:
            return sums
        settings = {"steps": 1, "micro": len(micros), "train": 0.0, "lr_scale": 1.0}
        state = ServerState(round=version, shared=shared)
        lost, losses = 0, dict[int, Tree]()
        while not losses:
            try:
                self._go(engine, self._jobs(state, settings, 0), [micros], losses)
            except _LostError as error:
                losses, lost = {}, lost + 1
                if lost >= self.tries:
                    raise error.refusal.error() from None
        for at, place in enumerate(whose):
            sums["loss_sum"][place] += losses[at]["loss_B"][0].double().sum()
            sums["count"][place] += losses[at]["count_B"][0].double().sum()
        return sums

    def _jobs(self, state: ServerState, settings: dict[str, float], seed: int) -> list[_Stage]:
        stages = []
        for stage, names in enumerate(self.names):
            trainable = {name: x for name, x in state.shared.trainable.items() if name in names}
            moments = {
                f"{MOMENTS}.{name}": x
                for name, x in state.optimizer.items()
                if name == "step" or name.partition("/")[2] in names
            }
            frozen = moments if trainable and settings["train"] else {}
            job = Job(
                work=PIPELINE,
                shared=Shared(trainable, frozen=frozen),
                version=state.round,
                clients=(stage,),
                seed=seed,
                settings=settings,
            )
            turns = list(job_turns(job, self.host.stages, self.host.order)) * int(settings["steps"])
            stages.append(_Stage(job=job, turns=turns, expected=list(self.host.questions(job))))
        return stages

    def _go(
        self,
        engine: Engine,
        stages: list[_Stage],
        steps: Sequence[Sequence[Rows]],
        losses: dict[int, Tree] | None = None,
    ) -> tuple[list[_Stage], dict[str, float]]:
        """Bring every output to the neighbour that waits for it, until all hosts have come to their end."""
        mail = _Mail(steps, self.clip, [sorted(stage.job.shared.trainable) for stage in stages], losses)
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
        wall, sums = max(stage.then for stage in stages), {"loss_sum": 0.0, "count": 0.0}
        last = stages[-1].end
        assert last is not None
        sums = {name: float(last.metrics[name][0]) for name in sums}
        busy = sum(stage.busy for stage in stages)
        metrics = {"loss": sums["loss_sum"] / max(sums["count"], 1.0), "busy": busy, "pace": wall}
        return stages, {**metrics, "idle": 1 - busy / (len(stages) * wall) if wall else 0.0}

    def _receive(self, place: int, stages: Sequence[_Stage], reply: Reply, mail: _Mail) -> None:
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


@final
class _Mail:
    """Outputs on their way to the neighbour that waits for them, with the virtual second at which they were there."""

    def __init__(
        self,
        steps: Sequence[Sequence[Rows]],
        clip: float | None,
        names: Sequence[Sequence[str]],
        losses: dict[int, Tree] | None,
    ) -> None:
        self.steps, self.clip, self.names, self.losses, self.stages = steps, clip, names, losses, len(names)
        self._inputs: dict[tuple[int, int, Op], tuple[Tensor, float]] = {}
        self._squares: dict[int, dict[int, tuple[Tensor, float]]] = {}

    def put(self, place: int, step: int, turn: Turn, message: Message, now: float) -> None:
        """Take the output of a host's question."""
        tensors, given = message.tensors, turn.gives
        if given is not None and "loss_B" in tensors:
            if self.losses is not None:
                self.losses[given.micro] = tensors
        elif given is not None:
            forward = given.kind == "forward"
            there = place + 1 if forward else place - 1
            self._inputs[there, step, given] = tensors["hidden_BTH" if forward else "grad_BTH"], now
        if "squares_P" in tensors:
            self._squares.setdefault(step, {})[place] = tensors["squares_P"][0], now

    def answer(self, place: int, stage: _Stage) -> Tree | None:
        """What a host that waits can be answered now; None: nothing yet."""
        if stage.want is None:
            return WORKED
        step, op = stage.want
        if op.kind == "step":
            return self._factor(stage, step)
        found: Tree = {}
        if op.kind == "backward" or place > 0:
            came = self._inputs.pop((place, step, op), None)
            if came is None:
                return None
            stage.then = max(stage.then, came[1])
            found["hidden_BTH" if op.kind == "forward" else "grad_BTH"] = came[0]
        if op.kind == "backward":
            return found
        micro = self.steps[step][op.micro]
        found["length_B"] = micro["length_B"][None]
        found["count"] = torch.tensor([sum(labelled(one) for one in self.steps[step])])
        if place == 0:
            found["ids_BT"] = micro["ids_BT"][None]
        if place == self.stages - 1:
            found["labels_BT"] = micro["labels_BT"][None]
        return found

    def _factor(self, stage: _Stage, step: int) -> Tree | None:
        """What every host multiplies its mean gradient by; None until all squares are there, where they are needed."""
        if self.clip is None:
            return {"factor": torch.ones(1, dtype=torch.float64)}
        squares = self._squares.get(step, {})
        if len(squares) < self.stages:
            return None
        stage.then = max(stage.then, *(now for _, now in squares.values()))
        each = {name: x for place, (x_P, _) in squares.items() for name, x in zip(self.names[place], x_P, strict=True)}
        total = sum((each[name] for name in sorted(each)), torch.zeros(()))  # as one process adds them up
        return {"factor": torch.tensor([min(1.0, self.clip / (float(total.sqrt()) + 1e-6))], dtype=torch.float64)}
