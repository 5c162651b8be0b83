"""How rounds are judged: scores of clients, means over them, exact sums, and the best validated tensors.

Legend: A clients that answered, N clients of the job.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.replies import CAUSES, Attendance
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.schedules import Synchronous

__all__ = [
    "MISSING",
    "SUMMED",
    "Center",
    "center",
    "is_validated",
    "mean_loss",
    "missing_of",
    "require_everyone",
    "score",
    "score_everyone",
    "score_summed",
    "summed",
    "with_best",
    "within_seconds",
]

Center = Literal["mean", "median", "trimmed_mean"]
"""How numbers of all clients become one."""

SUMMED = ("loss_sum", "count", "tokens", "failed")
"""Metrics that a round adds up."""


MISSING = "missing"
"""A metric of scores that some did not give in time: 0 for who gave one, else 1 + the place of its cause in CAUSES."""


def within_seconds(seconds: float) -> Synchronous | None:
    """When an evaluating job waits no longer; None where it waits for everybody."""
    return Synchronous(deadline=seconds) if seconds < math.inf else None


def score(engine: Engine, job: Job, admission: Admission = OPEN, *, within: float = math.inf) -> tuple[Tensor, Tree]:
    """Run an evaluating job: ``(client_N, metrics)`` of all its clients, by client, metrics ``(N, ...)`` float64.

    A client that did not answer, or not within so many seconds, has counted nothing: its metrics are zeros.
    """
    return _by_client(collect(engine, [job], admission=admission, schedule=within_seconds(within)), job)


def score_everyone(
    engine: Engine, job: Job, admission: Admission = OPEN, *, within: float = math.inf
) -> tuple[Tensor, Tree]:
    """As :func:`score`, of a score that is reported for every client.

    Args:
        engine: Asks them.
        job: What is asked.
        admission: What counts of what they answer.
        within: Seconds after which the score is that of those who came; who did not is told by the metric
            :data:`MISSING`, which is not there where everybody came. Infinite: all must come.

    Raises:
        LichenError: if a client could not do the job, or was not there, with its reason, and all must come; if nobody
            came. What was learned stays.
    """
    scored = collect(engine, [job], admission=admission, schedule=within_seconds(within))
    if within == math.inf or not len(scored.client_N):
        require_everyone(scored.attendance, job, "score")
    client_N, metrics = _by_client(scored, job)
    if scored.attendance.causes:
        place = {client: at for at, client in enumerate(client_N.tolist())}
        missing_N = torch.zeros(len(client_N), dtype=torch.float64)
        for code, cause in enumerate(CAUSES, start=1):
            for client in scored.attendance.causes.get(cause, ()) if within < math.inf else ():
                missing_N[place[client]] = code
        metrics = {**metrics, MISSING: missing_N} if bool(missing_N.any()) else metrics
    return client_N, metrics


def missing_of(metrics: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Clients that gave no score in time, by cause; nobody where all did.

    >>> missing_of({"count": torch.ones(3), MISSING: torch.tensor([0.0, 1.0, 3.0])})
    {'late': (1,), 'gone': (2,)}
    """
    codes = metrics[MISSING].long().tolist() if MISSING in metrics else []
    found = {cause: tuple(c for c, at in enumerate(codes) if at == code) for code, cause in enumerate(CAUSES, start=1)}
    return {cause: clients for cause, clients in found.items() if clients}


def score_summed(engine: Engine, job: Job, admission: Admission = OPEN) -> Tree:
    """As :func:`score`, of scores that are known as sums alone, ``(1, ...)`` over those of the clients who came.

    Raises:
        LichenError: if nobody came, with the first client's reason; what was learned stays.
    """
    scored = collect(engine, [job], admission=admission)
    if not len(scored.client_N):
        require_everyone(scored.attendance, job, "score")
        why = scored.attendance.named[0].what if scored.attendance.named else "nobody was there"
        fix = "go on with --resume when more are there; what was learned is in the run's folder"
        raise LichenError(f"nobody gave a score: {why}", where=f"work {job.work}", fix=fix)
    return {name: x_A.sum(0, keepdim=True) for name, x_A in scored.metrics.items()}


def require_everyone(attendance: Attendance, job: Job, what: str) -> None:
    """Nothing, where every client of a job did it, or sent what is not counted.

    Args:
        attendance: Who came.
        job: The job.
        what: What was asked for.

    Raises:
        LichenError: if a client could not do the job, or was not there, with its reason; what was learned stays.
    """
    failed = next((refusal for refusal in attendance.named if refusal.reason == "error"), None)
    count = len(attendance.missing) + attendance.refused.get("error", 0)
    if count:
        client = attendance.missing[0] if failed is None else failed.client
        why = "was not there" if failed is None else f"{failed.where}: {failed.what}".removeprefix(": ")
        others = f" (and {count - 1} more)" if count > 1 else ""
        fix = "go on with --resume when all are there; what was learned is in the run's folder"
        raise LichenError(f"client {client} gave no {what}{others}: {why}", where=f"work {job.work}", fix=fix)


def _by_client(scored: Collected, job: Job) -> tuple[Tensor, Tree]:
    if len(scored.client_N) == len(job.clients):
        return scored.client_N, scored.metrics
    client_N = torch.tensor(sorted(job.clients), dtype=torch.int64)
    place_A = torch.searchsorted(client_N, scored.client_N)
    whole = {name: x.new_zeros(len(client_N), *x.shape[1:]) for name, x in scored.metrics.items()}
    return client_N, {name: x.index_copy(0, place_A, scored.metrics[name]) for name, x in whole.items()}


def center(value_N: Tensor, kind: Center) -> float:
    """One number for those of all clients.

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018: less than half of
    the clients cannot move a median past the others' numbers, nor a tenth of them a mean without the ends, whatever
    they say.

    Args:
        value_N: Theirs.
        kind: ``mean``; ``median``, of an even number the mean of the middle two; ``trimmed_mean``, the mean without a
            tenth of them at each end, of one at least where there are three.

    >>> losses_N = torch.tensor([1.0, 2.0, 3.0, 1e9])
    >>> [center(losses_N, kind) for kind in ("mean", "median", "trimmed_mean")]
    [250000000.0, 2.5, 2.5]
    """
    if kind == "mean":
        return float(value_N.mean())
    count = len(value_N)
    ends = (count - 1) // 2 if kind == "median" else max(count // 10, min(1, (count - 1) // 2))
    return float(value_N.sort().values[ends : count - ends].mean())


def mean_loss(metrics: Mapping[str, Tensor], kind: Center = "mean") -> float:
    """Mean over clients of each client's mean loss, or another center; clients without a label do not count."""
    seen = metrics["count"] > 0
    return center(metrics["loss_sum"][seen] / metrics["count"][seen], kind)


def is_validated(round_: int, every: int, rounds: int) -> bool:
    """Whether a finished round, counted from 1, is followed by validation: every so many, and the last of them.

    >>> [r for r in range(1, 6) if is_validated(r, 2, 5)]
    [2, 4, 5]
    """
    return round_ % every == 0 or round_ == rounds


def summed(
    metrics_of: Mapping[str, Tensor], weight_N: Tensor | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """``(sums over clients, the metrics they make)``: mean ``loss``, and ``failed`` where somebody has.

    The sums are exact, so that neither the number of ranks nor that of threads shows in them.

    Args:
        metrics_of: By name, ``(N, ...)``.
        weight_N: What the clients weigh. Where it is known, one that says it has failed and yet weighs something has
            not: it cannot end a round in which it counts.
    """
    if weight_N is not None and "failed" in metrics_of:
        metrics_of = {**metrics_of, "failed": torch.where(weight_N > 0, 0.0, metrics_of["failed"])}
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
