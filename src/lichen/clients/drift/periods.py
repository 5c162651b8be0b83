"""Asks the clients of an engine whether their rows, or the losses on them, have drifted since an earlier period.

Legend: D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from lichen.clients.drift.distances import median_distance
from lichen.clients.drift.embedding_sums import BANDWIDTH
from lichen.clients.drift.loss_watch import ALARMED, RECENT, WATCHED, enough
from lichen.core.collecting.admission import OPEN, Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.wire.shared import Shared
from lichen.server.drift.mmd import SUMS, Mmd, mmd_of

__all__ = ["DriftReport", "LossReport", "compare_periods", "watch_losses"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DriftReport:
    """How rows of two periods differ.

    Attributes:
        mmd: By how much, and how likely that is where nothing has changed.
        bandwidth: Of the kernel.
        alarm: Whether p is at most the level.
        clients: How many were in the sums.
    """

    mmd: Mmd
    bandwidth: float
    alarm: bool
    clients: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LossReport:
    """How many clients saw their own losses rise.

    Attributes:
        alarmed: Those who did, in this period or a recent one.
        watched: Those who had a row.
        alarm: Whether that is enough of them.
    """

    alarmed: int
    watched: int
    alarm: bool


def compare_periods(
    engine: Engine,
    clients: Sequence[int],
    *,
    seed: int,
    bandwidth: float | None = None,
    level: float = 0.005,
    work: str = "drift",
    distances: str = "distances",
    base: str = "",
    admission: Admission = OPEN,
) -> DriftReport:
    """Compare two periods by one message of sums from each client.

    Args:
        engine: Whose clients do the work :class:`lichen.clients.drift.embedding_sums.EmbeddingSums` under the name
            ``work``, and, without a bandwidth, :class:`lichen.clients.drift.distances.DistanceBins`.
        clients: Who is asked.
        seed: Of the features and the permutations.
        bandwidth: The kernel's; None: the clients are asked for their median distance before.
        level: α: the chance of an alarm where nothing has changed.
        work: Name of the sums' work.
        distances: Name of the distances' work.
        base: Digest of the frozen base model that makes the features.
        admission: Which of the replies count.

    Returns:
        The same on all ranks.

    Raises:
        LichenError: if the level is no chance, nobody came, or a period has no row.
    """
    if not 0 < level < 1:
        raise LichenError(f"level {level}", where="drift.mmd.level", fix="use a number between 0 and 1")

    def ask(name: str, settings: dict[str, float]) -> tuple[Shared, int]:
        job = Job(
            work=name,
            shared=Shared(),
            version=0,
            clients=tuple(clients),
            seed=derive(seed, "drift"),
            base=base,
            settings=settings,
        )
        collected = collect(engine, [job], SUMS, admission=admission)
        if not SUMS.clients(collected.total):
            raise LichenError(
                "no client has rows of these periods", where=f"work {name}", fix="ask those who have some"
            )
        return SUMS.close(collected.total, Shared())[0], SUMS.clients(collected.total)

    if bandwidth is None:
        bandwidth = median_distance(ask(distances, {})[0].trainable["bins"])
    sums, count = ask(work, {BANDWIDTH: bandwidth})
    mmd = mmd_of(sums.trainable)
    return DriftReport(mmd=mmd, bandwidth=bandwidth, alarm=mmd.p <= level, clients=count)


def watch_losses(
    engine: Engine, job: Job, *, share: float = 0.2, recent: int = 1, admission: Admission = OPEN
) -> LossReport:
    """Let clients watch their losses for one period, and count the alarms.

    Args:
        engine: Whose clients do the work :class:`lichen.clients.drift.loss_watch.LossWatch`.
        job: Its name, the model's shared tensors, who is asked. Its version is the period's number: what the detectors
            know after it is staged as the next one, so that a period that is repeated gives the same.
        share: Of those who watched, that must be alarmed.
        recent: In this period, or in one of so many with it. Clients see a drift in different periods; ask for more
            than one, but for none before the last alarm.
        admission: Which of the replies count.

    Returns:
        The same on all ranks.

    Raises:
        LichenError: if the share or the number of periods is none, or nobody came.
    """
    if not 0 < share <= 1 or recent < 1:
        raise LichenError(
            f"share {share} of {recent} periods",
            where="drift.share",
            fix="use a share above 0, at most 1, and a period",
        )
    job = replace(job, settings={**job.settings, RECENT: float(recent)})
    metrics = collect(engine, [job], admission=admission).metrics
    if not metrics:
        raise LichenError("no client came to watch", where=f"work {job.work}", fix="ask those who have rows")
    alarmed, watched = (round(float(metrics[name].sum())) for name in (ALARMED, WATCHED))
    return LossReport(alarmed=alarmed, watched=watched, alarm=enough(alarmed, watched, share))
