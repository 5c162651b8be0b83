"""The one loop in which jobs go out and replies come in; every algorithm uses it.

What is admitted is folded into the aggregator, and what is not is dropped by name. Since sums are exact and know no
order, the total has the bytes of a round to which the dropped ones were never invited.

Jobs of former rounds that somebody has yet to answer are listened to as well: each reply is held against its own job,
and weighs by that job's age. Who has not answered when the schedule has enough stays in flight.

Legend: C clients, N clients that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.collecting.admission import OPEN, Admission, rows_of
from lichen.core.collecting.receipts import digest_C, receipts
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.replies import Attendance, Refusal, Reply, merged
from lichen.core.timing.flight import Flight
from lichen.core.timing.schedule import Schedule, VirtualClock
from lichen.core.tree import Tree

__all__ = ["Collected", "collect", "drain"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came of some jobs, on all ranks.

    Attributes:
        total: The aggregator's; None without one.
        client_N: Clients that count, ascending, int64.
        weight_N: What each of them weighs, float64; no discount is in it.
        version_N: The version of the job that each has answered, int64.
        metrics: Their metrics that were asked for, ``(N, ...)``.
        attendance: Who came, of those who answered or were given up.
        in_flight: Jobs that somebody has yet to answer.
        lost: ``(client, version of its job)`` of those who answered or were given up, and do not count; not of those
            who never take part or have left, whom no job reaches.
    """

    total: Any
    client_N: Tensor
    weight_N: Tensor
    version_N: Tensor
    metrics: Tree = field(default_factory=dict)
    attendance: Attendance = field(default_factory=Attendance)
    in_flight: tuple[Flight, ...] = ()
    lost: tuple[tuple[int, int], ...] = ()


@final
@dataclass(slots=True)
class _Came:
    """What has come to this rank so far."""

    total: Any
    ids: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    versions: list[Tensor] = field(default_factory=list)
    metrics: list[Tree] = field(default_factory=list)
    digests: list[Tensor] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def drain(engine: Engine, job: Job) -> Iterator[Message]:
    """Submit a job and yield every message as it comes; nothing is checked.

    Raises:
        LichenError: the first reason why a client cannot do it, once all have answered.
    """
    if not job.clients:
        return
    number, error = engine.submit(job), None
    try:
        for reply in engine.replies((number,)):
            if reply.question:
                raise LichenError("asks back, and nobody answers", where=f"work {job.work!r}")
            if reply.message is not None:
                yield reply.message
            error = error or reply.error
    finally:
        engine.cancel(number)
    if error is not None:
        raise error


def collect(
    engine: Engine,
    jobs: Sequence[Job],
    aggregator: Aggregator | None = None,
    *,
    admission: Admission = OPEN,
    keep: Collection[str] | None = None,
    seen: Callable[[Message, Job], None] | None = None,
    schedule: Schedule | None = None,
    in_flight: Sequence[Flight] = (),
    version: int | None = None,
) -> Collected:
    """Submit jobs and fold what is admitted of the replies to them, and to jobs in flight.

    Args:
        engine: Where clients are.
        jobs: What is asked; no client is asked twice.
        aggregator: Folds the messages; None: only their metrics are wanted.
        admission: What counts.
        keep: Names of the metrics that are wanted; None: all of them.
        seen: Called with every message that counts, and its job; of several ranks, each sees its own clients'.
        schedule: When to wait no longer, and what an old answer weighs; None: all are waited for.
        in_flight: Jobs of former rounds, submitted to this engine.
        version: Server steps so far, from which an answer's age is counted; None: that of its job.

    Returns:
        The same on all ranks.

    Raises:
        LichenError: where every client of whom something is known could not do its job, the first one's reason.
    """
    flights = {flight.number: flight for flight in in_flight if flight.number is not None}
    for job in jobs:
        if job.clients:
            number = engine.submit(job)
            flights[number] = Flight(job=job, waiting=job.clients, sent=engine.now(), number=number)
    expected = {number: admission.expected(flight.job) for number, flight in flights.items()}
    counted = {number: set(flight.job.clients) - set(flight.waiting) for number, flight in flights.items()}
    invited = {number: frozenset(flight.job.clients) for number, flight in flights.items()}
    waiting = {number: set(flight.waiting) for number, flight in flights.items()}
    came = _Came(None if aggregator is None else aggregator.zero())

    def take(reply: Reply) -> int:
        """Fold a reply in; how many clients of it count."""
        job = flights[reply.job].job
        waiting[reply.job] -= set(reply.clients)
        message, refused = admission.admit(
            reply, job, expected[reply.job], counted[reply.job], invited=invited[reply.job]
        )
        if message is not None and aggregator is not None:
            age = 0 if version is None else version - job.version
            discount = 1.0 if schedule is None else schedule.discount(age)
            came.total, message, others = _folded(aggregator, came.total, message, discount)
            refused += others
        if refused:
            came.refusals = merged([*came.refusals, *refused])
        if message is None:
            return 0
        if seen is not None:
            seen(message, job)
        came.ids.append(message.client_C)
        came.weights.append(message.weight_C.detach().cpu().double())
        came.versions.append(message.version_C.detach().cpu())
        came.digests.append(digest_C(message))
        came.metrics.append({name: x for name, x in message.metrics.items() if keep is None or name in keep})
        return len(message.client_C)

    left: tuple[Flight, ...] = ()
    try:
        left = _receive(engine, flights, waiting, schedule, take)
    finally:
        for number in flights.keys() - {flight.number for flight in left}:
            engine.cancel(number)
    if aggregator is not None:
        came.total = engine.merge(aggregator, came.total)
    # Of those in flight nothing is known yet.
    unknown = {number: waiting[number] if any(f.number == number for f in left) else set[int]() for number in flights}
    requested = [(c, one.job.version) for n, one in flights.items() for c in one.waiting if c not in unknown[n]]
    joined = _joined(engine, [client for client, _ in requested], came)
    if schedule is not None and schedule.takes_old and not isinstance(engine, VirtualClock):
        # Of one server process: what a step had in it was decided by who came first, and nothing else tells that.
        order = tuple(zip(_listed(came.ids), _listed(came.versions), strict=True))
        joined = replace(joined, attendance=replace(joined.attendance, order=order))
    causes = joined.attendance.causes
    known = {*joined.client_N.tolist(), *causes.get("absent", ()), *causes.get("withdrawn", ())}
    return replace(joined, in_flight=left, lost=tuple(one for one in requested if one[0] not in known))


def _listed(some: Sequence[Tensor]) -> list[int]:
    return [number for one in some for number in one.tolist()]


def _receive(
    engine: Engine,
    flights: Mapping[int, Flight],
    waiting: Mapping[int, set[int]],
    schedule: Schedule | None,
    take: Callable[[Reply], int],
) -> tuple[Flight, ...]:
    """Take replies until the schedule has enough, or nobody is left to wait for; the jobs that are still in flight."""
    deadline, arrived = math.inf if schedule is None else schedule.deadline, 0
    while open_numbers := [number for number in flights if waiting[number]]:
        until = min(flights[number].sent + deadline for number in open_numbers)
        for reply in engine.replies(open_numbers, until):
            arrived += take(reply)
            if schedule is not None and schedule.enough(arrived):
                still = ((flight, tuple(c for c in flight.waiting if c in waiting[n])) for n, flight in flights.items())
                return tuple(replace(flight, waiting=some) for flight, some in still if some)
        if engine.now() < until:  # nothing more will come
            break
        for number in open_numbers:
            if flights[number].sent + deadline <= until:
                waiting[number].clear()
                engine.cancel(number)
    return ()


def _folded(
    aggregator: Aggregator, total: Any, message: Message, discount: float
) -> tuple[Any, Message | None, list[Refusal]]:
    """``(total, what was folded, who was not)``; where a stack does not fold, each client is tried alone."""
    with suppress(LichenError):
        return aggregator.add(total, message, _discount_C(message, discount)), message, []
    folded, refusals = list[int](), list[Refusal]()
    for c, client in enumerate(message.client_C.tolist()):
        try:
            one = rows_of(message, [c])
            total = aggregator.add(total, one, _discount_C(one, discount))
            folded.append(c)
        except LichenError as error:
            refusals.append(Refusal(client=client, reason="sum", what=error.what, where=error.where, fix=error.fix))
    return total, rows_of(message, folded) if folded else None, refusals


def _discount_C(message: Message, discount: float) -> Tensor | None:
    return None if discount == 1.0 else torch.full((len(message.client_C),), discount, dtype=torch.float64)


def _joined(engine: Engine, requested: Sequence[int], came: _Came) -> Collected:
    """Everybody's, from what came to this rank; ``requested`` are those who answered or were given up."""
    nobody = torch.empty(0, dtype=torch.int64)
    lists = {"weight": came.weights, "version": came.versions, "sha256": came.digests}
    mine = {name: torch.cat(some) for name, some in lists.items()} if came.weights else {}
    if came.metrics:
        common = set.intersection(*(set(one) for one in came.metrics))  # undeclared works may tell unlike things
        rows = trees.concatenate([{name: x for name, x in one.items() if name in common} for one in came.metrics])
        mine = trees.join("m.", rows, mine)
    shown = [refusal.shown() for refusal in came.refusals]
    lines = [(str(r.client), r.reason, r.what, r.where, r.fix, str(r.times), r.cause) for r in shown]
    client_N, tree, every = engine.join(torch.cat(came.ids) if came.ids else nobody, mine, lines)
    refused = [
        Refusal(client=int(client), reason=reason, what=what, where=where, fix=fix, times=int(times), cause=cause)
        for client, reason, what, where, fix, times, cause in every
    ]
    weight_N = tree.pop("weight", torch.empty(0, dtype=torch.float64))
    version_N = tree.pop("version", nobody)
    counted = receipts(client_N, version_N, weight_N, tree.pop("sha256", torch.empty(0, 0)))
    attendance = Attendance.of(requested, client_N.tolist(), refused, counted)
    errors = [refusal for refusal in refused if refusal.reason == "error"]
    if requested and {refusal.client for refusal in errors} >= set(requested):
        raise errors[0].error()
    return Collected(
        total=came.total,
        client_N=client_N,
        weight_N=weight_N,
        version_N=version_N,
        metrics=trees.split(tree, "m.")[0],
        attendance=attendance,
    )
