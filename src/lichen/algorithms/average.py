"""Federated averaging: rounds of local training and one mean change, and all methods of this shape.

Federated averaging (McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017) with the server step of Reddi et al., "Adaptive Federated
Optimization", ICLR 2021. What the change is (full tensors, LoRA factors and a residual patch, a
closed-form head) is the aggregator's business; what a client does is the work's.

The ``schedule`` says when: rounds wait for all they invite, or the server steps after every K answers, some of which
were made for older tensors, and those who have not answered stay at work.

With ``down``, what clients hold is a *view* that follows the server's tensors by coded steps
(:mod:`lichen.transforms.delta`): they train from it, and it is what is validated and kept.
With ``capacity``, weaker clients get a part of the tensors.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from lichen.algorithms.plan import check_plan
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.collecting.history import History
from lichen.core.collecting.in_flight import give_up_old, now_in_flight
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator, Sampler, ServerOptimizer, Submodel
from lichen.core.fold import BEST
from lichen.core.message import Job
from lichen.core.replies import Attendance
from lichen.core.seeds import derive
from lichen.core.timing.schedule import Schedule, VirtualClock
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.schedules import SYNCHRONOUS
from lichen.transforms.codec import Chain
from lichen.transforms.downlink import DownlinkState

__all__ = ["SUMMED", "Average", "is_validated", "score", "sent_params", "summed", "with_best"]

SUMMED = ("loss_sum", "count", "tokens", "failed")
"""Metrics that a round adds up."""


def score(engine: Engine, job: Job, admission: Admission = OPEN) -> tuple[Tensor, Tree]:
    """Run an evaluating job: ``(client_N, metrics)`` of all its clients, by client, metrics ``(N, ...)`` float64.

    A client that did not answer has counted nothing: its metrics are zeros.
    """
    scored = collect(engine, [job], admission=admission)
    if len(scored.client_N) == len(job.clients):
        return scored.client_N, scored.metrics
    client_N = torch.tensor(sorted(job.clients), dtype=torch.int64)
    place_A = torch.searchsorted(client_N, scored.client_N)
    whole = {name: x.new_zeros(len(client_N), *x.shape[1:]) for name, x in scored.metrics.items()}
    return client_N, {name: x.index_copy(0, place_A, scored.metrics[name]) for name, x in whole.items()}


def mean_loss(metrics: Mapping[str, Tensor]) -> float:
    """Mean over clients of each client's mean loss; clients without a label do not count."""
    seen = metrics["count"] > 0
    return float((metrics["loss_sum"][seen] / metrics["count"][seen]).mean())


def is_validated(round_: int, every: int, rounds: int) -> bool:
    """Whether a finished round, counted from 1, is followed by validation: every so many, and the last of them.

    >>> [r for r in range(1, 6) if is_validated(r, 2, 5)]
    [2, 4, 5]
    """
    return round_ % every == 0 or round_ == rounds


def summed(metrics_of: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """``(sums over clients, the metrics they make)``: mean ``loss``, and ``failed`` where somebody has.

    The sums are exact, so that neither the number of ranks nor that of threads shows in them.
    """
    sums = {name: math.fsum(metrics_of[name].tolist()) if name in metrics_of else 0.0 for name in SUMMED}
    metrics = {"loss": sums["loss_sum"] / sums["count"]} if sums["count"] else {}
    if sums["failed"]:
        metrics["failed"] = sums["failed"]
    return sums, metrics


def with_best(state: ServerState, value: float, shared: Shared) -> ServerState:
    """The state, with these tensors kept if no validated round before had a smaller value."""
    if math.isnan(state.best_value) or value < state.best_value:
        return replace(state, best=shared, best_round=state.round, best_value=value)
    return state


def sent_params(state: ServerState) -> Shared:
    """The newest tensors that clients are sent: the view where there is one, else ``shared``."""
    return DownlinkState.of(state.downlink).snapshot if state.downlink else state.shared


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
        judged: From the sums of validation to what a report has beside their loss; None: nothing.
        personal: Clients keep tensors of their own: those of the best round stay with them, too.
        admission: What counts of what clients send.
        schedule: Who is asked beside those still at work, when a round has enough, and what an old answer weighs. A
            round with fewer than its least changes nothing but its number, and is told by the metric ``skipped``.
        lr_scale: Factor on the clients' learning rate in round r (from 0).
        base: Digest of the frozen base model.
        rounds: Rounds in all: the last is always validated.
        down: Codes what clients are sent of each round's change; None: they are sent all tensors whole.
        agreed: With ``down``: every client can make the first tensors itself, and is not sent them.
        capacity: What weaker clients get in training; None: all get the same.
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
    judged: Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None = None
    personal: bool = False
    admission: Admission = OPEN
    schedule: Schedule = SYNCHRONOUS
    lr_scale: Callable[[int], float] = lambda _: 1.0
    base: str = ""
    down: Chain | None = None
    agreed: bool = False
    capacity: Submodel | None = None
    history: History | None = None

    def __post_init__(self) -> None:
        check_plan(
            aggregator=self.aggregator,
            work=self.admission.works.get(self.work),
            schedule=self.schedule,
            down=self.down,
            capacity=self.capacity,
        )

    def init(self, shared: Shared) -> ServerState:
        """The state before the first round."""
        return ServerState(round=0, shared=shared, optimizer=self.optimizer.init(shared))

    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]:
        """One round. A round nobody comes to changes nothing but its number."""
        state, old = give_up_old(now_in_flight(state, engine), engine, self.schedule)
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        busy = frozenset(client for flight in state.in_flight for client in flight.waiting)
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
        job = job if downlink is None else downlink.job(job)
        came = collect(
            engine,
            list(self._parts(job)),
            self.aggregator,
            admission=self.admission,
            keep=SUMMED,
            seen=None if self.history is None else partial(self.history.put, state.round),
            schedule=self.schedule,
            in_flight=state.in_flight,
            version=state.round,
        )
        snapshots = {one.version: one.snapshot for one in (*(flight.job for flight in state.in_flight), job)}
        sums, metrics = summed(came.metrics)
        enough = came.attendance.arrived >= max(self.schedule.least, 1) and sums["failed"] < came.attendance.arrived
        if self.history is not None:
            self.history.retain(state.round, came.client_N.tolist() if enough else ())
        if enough:
            change, aggregated = self.aggregator.close(
                came.total, state.shared if downlink is None else _clients_start(downlink, state)
            )
            metrics.update(aggregated)
            shared, optimizer = self.optimizer.update(change, state.optimizer, state.shared)
            state = replace(state, shared=shared, optimizer=optimizer)
        if downlink is not None and self.down is not None:
            for version, snapshot in snapshots.items():
                downlink = downlink.acknowledge(came.client_N[came.version_N == version].tolist(), snapshot)
            if enough:
                downlink = downlink.advance(state.shared, self.down, derive(seed, "down"))
            state = replace(state, downlink=downlink.tree())
        if clients and not enough:
            metrics["skipped"] = 1.0
        metrics.update(_ages(came, state.round))
        attendance = came.attendance + Attendance.of(old, (), ()) if old else came.attendance
        state = replace(state, round=state.round + 1, in_flight=came.in_flight)
        trained_up, trained_down = engine.bytes_up, engine.bytes_down
        if self.valid and is_validated(state.round, self.valid_every, self.rounds):
            state, judged, came_to_judge = self._validate(state, engine)
            attendance += came_to_judge
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

    def _settings(self, state: ServerState) -> dict[str, float]:
        """What a round's job says in numbers; as many in every round, so that all jobs are of one size."""
        best_settings = {BEST: float(state.best_round)} if self.personal else {}
        return {"lr_scale": self.lr_scale(state.round), **best_settings}

    def _downlink(self, state: ServerState) -> DownlinkState | None:
        """What clients hold; from the tensors as they are where a run goes on that had no codec."""
        if self.down is None:
            return None
        if state.downlink:
            return DownlinkState.of(state.downlink)
        return DownlinkState.initial(state.shared, self.weight_N.shape[0], agreed=self.agreed and state.round == 0)

    def _parts(self, job: Job) -> Iterator[Job]:
        """The job, or one for each capacity."""
        if self.capacity is None:
            yield job
            return
        by_key: dict[Hashable, list[int]] = {}
        for client in job.clients:
            by_key.setdefault(self.capacity.key(client), []).append(client)
        for key, some in by_key.items():
            yield replace(job, clients=tuple(some), shared=self.capacity.extract(job.shared, key))

    def _validate(self, state: ServerState, engine: Engine) -> tuple[ServerState, dict[str, float], Attendance]:
        """``(state, metrics, who came)``: the mean loss is ``valid``; no metrics where nobody with a label came."""
        judges = tuple(range(self.weight_N.shape[0])) if self.validators is None else self.validators
        job = Job(
            work=str(self.valid),
            shared=state.shared.for_model,
            version=state.round,
            clients=judges,
            seed=0,
            base=self.base,
        )
        downlink = self._downlink(state)
        if downlink is not None:
            job = downlink.job(job)
        came = collect(engine, [job], admission=self.admission)
        if downlink is not None:
            state = replace(state, downlink=downlink.acknowledge(came.client_N.tolist(), job.snapshot).tree())
        if not came.attendance.arrived:
            return state, {}, came.attendance
        value = mean_loss(came.metrics)
        shared = state.shared if downlink is None else downlink.snapshot
        more = {} if self.judged is None else self.judged(came.metrics)
        return with_best(state, value, shared), {"valid": value, **more}, came.attendance


def _clients_start(downlink: DownlinkState, state: ServerState) -> Shared:
    """Where the clients began, with the server's own patch, which no codec has rounded."""
    return replace(downlink.snapshot, patch=state.shared.patch)


def _ages(came: Collected, version: int) -> dict[str, float]:
    """The mean ``age`` of the answers that count, in server steps, where some are old."""
    if not bool((came.version_N < version).any()):
        return {}
    return {"age": float((version - came.version_N).double().mean())}
