"""Federated averaging: rounds of local training and one mean change, and all methods of this shape.

Federated averaging (McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017) with the server step of Reddi et al., "Adaptive Federated
Optimization", ICLR 2021. What the change is (full tensors, LoRA factors and a residual patch, a
closed-form head) is the aggregator's business; what a client does is the work's.

The ``schedule`` says when: rounds wait for all they invite, or the server steps after every K answers, some of which
were made for older tensors, and those who have not answered stay at work.

The ``downlink`` says what clients are sent: all tensors, a part for weaker ones, or steps of a *view*, which is then
what they train from and what is validated and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from torch import Tensor

from lichen.algorithms.plan import check_plan, transforms_of
from lichen.algorithms.scores import SUMMED, Center, is_validated, mean_loss, summed, with_best, within_seconds
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.collecting.history import Retains
from lichen.core.collecting.in_flight import at_work, give_up_old, now_in_flight
from lichen.core.collecting.rollback import rollback_after, with_rollback
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator, Sampler, ServerOptimizer
from lichen.core.fold import BEST
from lichen.core.message import Job
from lichen.core.replies import Attendance
from lichen.core.seeds import derive
from lichen.core.timing.schedule import Schedule, VirtualClock
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.mixing import step_of
from lichen.server.schedules import SYNCHRONOUS
from lichen.transforms.downlink import WHOLE, Downlink
from lichen.transforms.transform import Transform, Transformed, measures, on_total

__all__ = ["Average"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """Invite, train, average, step, validate.

    Attributes:
        aggregator: Folds the messages into one change.
        optimizer: Steps with it.
        sampler: Invites from the roster.
        weight_N: Examples of every client, for the sampler.
        work: The clients' work.
        valid: Their validating work; None for none.
        valid_every: Rounds between validations. The best validated ``shared`` is kept.
        validators: Clients that validate; None: all of them.
        valid_average: How validation losses of clients become one.
        judged: From the sums of validation to what a report has beside their loss; None: nothing.
        personal: Clients keep tensors of their own: those of the best round stay with them, too.
        admission: What counts of what clients send.
        schedule: Who is asked beside those still at work, when a round has enough, and what an old answer weighs. A
            round with fewer than its least changes nothing but its number, and is told by the metric ``skipped``.
        scoring: Seconds that a validation waits at most; who has not answered is missing, and in no mean.
        lr_scale: Factor on the clients' learning rate in round r (from 0).
        base: Digest of the frozen base model.
        rounds: Rounds in all: the last is always validated.
        downlink: What happens to a job on its way to the clients.
        steps_always: A round is a step whoever came to it, and the aggregator closes what there is; for rounds that
            must not show who came.
        history: Retains what clients sent in every round that made a step; None: nothing is retained.

    Raises:
        LichenError: if parts do not go together (:mod:`lichen.algorithms.plan`).
    """

    aggregator: Aggregator
    optimizer: ServerOptimizer
    sampler: Sampler
    weight_N: Tensor
    rounds: int
    work: str = "train"
    valid: str | None = "valid"
    valid_every: int = 1
    validators: tuple[int, ...] | None = None
    valid_average: Center = "mean"
    judged: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None
    personal: bool = False
    admission: Admission = OPEN
    schedule: Schedule = SYNCHRONOUS
    scoring: float = math.inf
    lr_scale: Callable[[int], float] = lambda _: 1.0
    base: str = ""
    downlink: Downlink = WHOLE
    steps_always: bool = False
    history: Retains | None = None

    def __post_init__(self) -> None:
        check_plan(
            aggregator=self.aggregator,
            work=self.admission.works.get(self.work),
            schedule=self.schedule,
        )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        return ServerState(round=0, shared=shared, optimizer=self.optimizer.init(shared))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round. A round nobody comes to changes nothing but its number."""
        state, old = give_up_old(now_in_flight(state, engine), engine, self.schedule)
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        busy = at_work(state)
        clients = self.schedule.invite(
            lambda draw_seed: self.sampler.invite(self.weight_N, draw_seed), busy, derive(seed, "invite")
        )
        downlink = self._downlink(state)
        job = Job(
            work=self.work,
            shared=state.shared,
            version=state.round,
            clients=clients,
            seed=seed,
            base=self.base,
            settings=self._settings(state),
        )
        jobs = tuple(with_rollback(one, state.rollback) for one in self.downlink.jobs(job, downlink))
        transforms = transforms_of(self.admission.works.get(self.work))
        came = collect(
            engine,
            jobs,
            self.aggregator,
            admission=self._admission(state, transforms),
            keep=(*SUMMED, *measures(transforms)),
            seen=None if self.history is None else partial(self.history.put, state.round),
            schedule=self.schedule,
            in_flight=state.in_flight,
            version=state.round,
        )
        requested = (*(flight.job for flight in state.in_flight), *jobs)
        for sent in requested:
            answered = came.client_N[came.version_N == sent.version].tolist()
            downlink = self.downlink.acknowledge(sent, answered, downlink)
        sums, metrics = summed(came.metrics, came.weight_N)
        some = came.attendance.arrived >= max(self.schedule.least, 1) and sums["failed"] < came.attendance.arrived
        enough = some or self.steps_always
        if self.history is not None:
            self.history.retain(state.round, came.client_N.tolist() if enough else ())
        if enough:
            change, aggregated = self.aggregator.close(came.total, self.clients_start(state))
            clients_came, versions_came = came.client_N.tolist(), came.version_N.tolist()
            change = step_of(change, self.schedule, requested, clients_came, versions_came, job)
            change, noted, transformed = on_total(
                transforms,
                change,
                state.transforms,
                came.metrics,
                clients=self.aggregator.clients(came.total),
                seed=derive(seed, "total"),
            )
            metrics.update(aggregated | noted)
            shared, optimizer = self.optimizer.update(change, state.optimizer, state.shared)
            downlink = self.downlink.advance(shared, downlink, derive(seed, "down"))
            state = replace(state, shared=shared, optimizer=optimizer, transforms=transformed)
        rollback = rollback_after(state.rollback, came, counted=enough, old=old)
        state = replace(state, downlink=downlink, rollback=rollback)
        if clients and not enough:
            metrics["skipped"] = 1.0
        metrics.update(_ages(came, state.round))
        attendance = came.attendance + Attendance.of(old, (), (), missing="given up") if old else came.attendance
        state = replace(state, round=state.round + 1, in_flight=came.in_flight)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.rounds):
            # Where time is real, a client does one thing at a time, and no validation waits for its training.
            working = frozenset[int]() if isinstance(engine, VirtualClock) else at_work(state)
            state, judged, came_to_judge = self.validate(state, engine, working)
            attendance += came_to_judge.judging()
            metrics.update(judged)
        if isinstance(engine, VirtualClock):
            metrics["time"] = engine.now()
            state = replace(state, clock=engine.now())
        return state, Report(
            round=state.round,
            clients=clients,
            metrics=metrics,
            tokens=int(sums["tokens"]),
            bytes_up=engine.bytes_up - up,
            bytes_down=engine.bytes_down - down,
            seconds=time.perf_counter() - start,
            valid_up=engine.bytes_up - trained_up,
            valid_down=engine.bytes_down - trained_down,
            attendance=attendance,
        )

    def _admission(self, state: ServerState, transforms: Sequence[Transform]) -> Admission:
        """What counts, with what the transforms know from former rounds."""
        work = self.admission.works.get(self.work)
        if not transforms or not isinstance(work, Transformed):
            return self.admission
        return replace(self.admission, works={**self.admission.works, self.work: replace(work, state=state.transforms)})

    def _settings(self, state: ServerState) -> dict[str, float]:
        """What a round's job says in numbers; as many in every round, so that all jobs are of one size."""
        best_settings = {BEST: float(state.best_round)} if self.personal else {}
        return {"lr_scale": self.lr_scale(state.round), **best_settings}

    def clients_start(self, state: ServerState) -> Shared:
        """What the clients of the next round begin from, with the server's own patch, which no codec has rounded."""
        return replace(self.downlink.snapshot(state.shared, self._downlink(state)), patch=state.shared.patch)

    def _downlink(self, state: ServerState) -> Tree:
        """What is known of the clients; from the tensors as they are where a run goes on that knew nothing."""
        return state.downlink or self.downlink.init(state.shared, len(self.weight_N), first=state.round == 0)

    def validate(
        self, state: ServerState, engine: Engine, busy: frozenset[int] = frozenset()
    ) -> tuple[ServerState, dict[str, float], Attendance]:
        """``(state, metrics, who came)``: the mean loss is ``valid``; no metrics where nobody with a label came.

        Args:
            state: The state.
            engine: Where clients are.
            busy: Are not asked.
        """
        everyone = range(self.weight_N.shape[0]) if self.validators is None else self.validators
        judges = tuple(client for client in everyone if client not in busy)
        job = Job(
            work=str(self.valid),
            shared=state.shared.for_model,
            version=state.round,
            clients=judges,
            seed=0,
            base=self.base,
        )
        whole = self.downlink.jobs(job, state.downlink, whole=True)
        jobs = [with_rollback(one, state.rollback, at_work(state)) for one in whole]
        came = collect(engine, jobs, admission=self.admission, schedule=within_seconds(self.scoring))
        for sent in jobs:
            answered = came.client_N.tolist()
            state = replace(state, downlink=self.downlink.acknowledge(sent, answered, state.downlink))
        if not came.attendance.arrived:
            return state, {}, came.attendance
        value = mean_loss(came.metrics, self.valid_average)
        more = {} if self.judged is None else self.judged(came.metrics)
        shared = self.downlink.snapshot(state.shared, state.downlink)
        return with_best(state, value, shared), {"valid": value, **more}, came.attendance


def _ages(came: Collected, version: int) -> dict[str, float]:
    """The mean ``age`` of the answers that count, in server steps, where some are old."""
    if not bool((came.version_N < version).any()):
        return {}
    return {"age": float((version - came.version_N).double().mean())}
