"""The one loop in which jobs go out and replies come in; every algorithm uses it.

What is admitted is folded into the aggregator, and what is not is dropped by name. Since sums are exact and know no
order, the total has the bytes of a round to which the dropped ones were never invited.

Legend: C clients, N clients that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.collecting.admission import OPEN, Admission, rows_of
from lichen.core.contracts import Aggregator, Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.replies import Attendance, Refusal
from lichen.core.tree import Tree

__all__ = ["Collected", "collect", "drain"]

WORDS = 5
"""Words of a refusal on its way between ranks."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came of some jobs, on all ranks.

    Attributes:
        total: The aggregator's; None without one.
        client_N: Clients that count, ascending, int64.
        weight_N: What each of them weighs, float64.
        metrics: Their metrics that were asked for, ``(N, ...)``.
        attendance: Who came.
    """

    total: Any
    client_N: Tensor
    weight_N: Tensor
    metrics: Tree = field(default_factory=dict)
    attendance: Attendance = field(default_factory=Attendance)


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
    until: float = math.inf,
) -> Collected:
    """Submit jobs and fold what is admitted of their replies.

    Args:
        engine: Where clients are.
        jobs: What is asked; no client is asked twice.
        aggregator: Folds the messages; None: only their metrics are wanted.
        admission: What counts.
        keep: Names of the metrics that are wanted; None: all of them.
        seen: Called with every message that counts, and its job; of several ranks, each sees its own clients'.
        until: When to wait no longer, on the engine's clock.

    Returns:
        The same on all ranks.

    Raises:
        LichenError: where every client that was asked could not do its job, the first one's reason.
    """
    out = {engine.submit(job): job for job in jobs if job.clients}
    expected = {number: admission.expected(job) for number, job in out.items()}
    counted: dict[int, set[int]] = {number: set() for number in out}
    refusals, ids, weights, metrics = list[Refusal](), list[Tensor](), list[Tensor](), list[Tree]()
    total = None if aggregator is None else aggregator.zero()
    try:
        for reply in engine.replies(out, until):
            job = out[reply.job]
            message, refused = admission.admit(reply, job, expected[reply.job], counted[reply.job])
            refusals += refused
            if message is not None and aggregator is not None:
                total, message, refused = _folded(aggregator, total, message)
                refusals += refused
            if message is None:
                continue
            if seen is not None:
                seen(message, job)
            ids.append(message.client_C)
            weights.append(message.weight_C.detach().cpu().double())
            metrics.append({name: x for name, x in message.metrics.items() if keep is None or name in keep})
    finally:
        for number in out:
            engine.cancel(number)
    if aggregator is not None:
        total = engine.merge(aggregator, total)
    return _joined(engine, [c for job in jobs for c in job.clients], total, ids, weights, metrics, refusals)


def _folded(aggregator: Aggregator, total: Any, message: Message) -> tuple[Any, Message | None, list[Refusal]]:
    """``(total, what was folded, who was not)``; where a stack does not fold, each client is tried alone."""
    with suppress(LichenError):
        return aggregator.add(total, message), message, []
    folded, refusals = list[int](), list[Refusal]()
    for c, client in enumerate(message.client_C.tolist()):
        try:
            total = aggregator.add(total, rows_of(message, [c]))
            folded.append(c)
        except LichenError as error:
            refusals.append(Refusal(client=client, reason="sum", what=error.what, where=error.where, fix=error.fix))
    return total, rows_of(message, folded) if folded else None, refusals


def _joined(
    engine: Engine,
    invited: Sequence[int],
    total: Any,
    ids: Sequence[Tensor],
    weights: Sequence[Tensor],
    metrics: Sequence[Tree],
    refusals: Sequence[Refusal],
) -> Collected:
    """Everybody's, from what came to this rank."""
    nobody = torch.empty(0, dtype=torch.int64)
    mine = {"weight": torch.cat(list(weights))} if weights else {}
    if metrics:
        common = set.intersection(*(set(one) for one in metrics))  # works that nobody declares may tell unlike things
        rows = trees.concatenate([{name: x for name, x in one.items() if name in common} for one in metrics])
        mine = trees.join("m.", rows, mine)
    lines = [(str(r.client), r.reason, r.what, r.where, r.fix) for r in refusals]
    client_N, tree, every = engine.join(torch.cat(list(ids)) if ids else nobody, mine, lines)
    refused = [
        Refusal(client=int(line[0]), reason=line[1], what=line[2], where=line[3], fix=line[4])
        for line in every
        if len(line) == WORDS
    ]
    attendance = Attendance.of(invited, client_N.tolist(), refused)
    errors = [refusal for refusal in refused if refusal.reason == "error"]
    if invited and {refusal.client for refusal in errors} >= set(invited):
        raise errors[0].error()
    weight_N = tree.pop("weight", torch.empty(0, dtype=torch.float64))
    return Collected(
        total=total,
        client_N=client_N,
        weight_N=weight_N,
        metrics=trees.split(tree, "m.")[0],
        attendance=attendance,
    )
