"""Finds when a run first reached a value: its round, its bytes and its seconds.

Two runs that end alike may differ tenfold in what it cost to get there. A curve is a run's reports in
order; a round that was repeated after a kill, and so told twice, counts once, as it was told last.

References:
    H. Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson and Blaise Agüera y Arcas.
    "Communication-Efficient Learning of Deep Networks from Decentralized Data." AISTATS 2017.
    https://arxiv.org/abs/1602.05629 (rounds to a target as the measure)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lichen.core.errors import LichenError

if TYPE_CHECKING:
    from lichen.core.contracts.algorithm import Report

__all__ = ["ACCURACY", "bytes_to", "rounds_to", "seconds_to"]

ACCURACY = "valid_accuracy"
"""The metric of reports that is the share of validation rows that are right."""


def rounds_to(
    curve: Iterable[Report], target: float, *, metric: str = "valid", higher: bool = False, start: float | None = None
) -> int | None:
    """The first round after which ``metric`` is at the target or beyond; None if it never is.

    Args:
        curve: Reports; rounds without the metric, or where it is not a number, are passed over.
        target: What is to be reached.
        metric: A name in the reports' metrics.
        higher: More is better; by default less is, as of a loss.
        start: The value before the first round, where it is known: a target that it meets takes 0 rounds.

    Raises:
        LichenError: if the target is not a number, or no round has the metric.
    """
    found = _reached(list(_once(curve)), target, metric, higher, start)
    return None if found is None else found[0]


def bytes_to(
    curve: Iterable[Report],
    target: float,
    *,
    metric: str = "valid",
    higher: bool = False,
    start: float | None = None,
    validation: bool = False,
) -> int | None:
    """Bytes sent both ways, by all clients, until ``metric`` is at the target or beyond; None if it never is.

    Args:
        curve: As for :func:`rounds_to`, from the first round on.
        target: What is to be reached.
        metric: A name in the reports' metrics.
        higher: More is better.
        start: As for :func:`rounds_to`; a target met at once takes 0 bytes.
        validation: Count the bytes of validation alone, which are among the others.

    Raises:
        LichenError: as :func:`rounds_to`.
    """
    reports = list(_once(curve))
    found = _reached(reports, target, metric, higher, start)
    if found is None:
        return None
    if validation:
        return sum(report.valid_up + report.valid_down for report in reports[: found[1]])
    return sum(report.bytes_up + report.bytes_down for report in reports[: found[1]])


def seconds_to(
    curve: Iterable[Report], target: float, *, metric: str = "valid", higher: bool = False, start: float | None = None
) -> float | None:
    """Seconds until ``metric`` is at the target or beyond; None if it never is.

    Virtual ones since the start where the reports have a ``time``, else those that the rounds took.

    Args:
        curve: As for :func:`rounds_to`, from the first round on.
        target: What is to be reached.
        metric: A name in the reports' metrics.
        higher: More is better.
        start: As for :func:`rounds_to`; a target met at once takes no time.

    Raises:
        LichenError: as :func:`rounds_to`.
    """
    reports = list(_once(curve))
    found = _reached(reports, target, metric, higher, start)
    if found is None:
        return None
    there = reports[: found[1]]
    return there[-1].metrics["time"] if there and "time" in there[-1].metrics else sum(r.seconds for r in there)


def _once(curve: Iterable[Report]) -> Iterable[Report]:
    last = {report.round: report for report in curve}
    return (last[number] for number in sorted(last))


def _reached(
    reports: list[Report], target: float, metric: str, higher: bool, start: float | None
) -> tuple[int, int] | None:
    """``(round, how many reports lead there)``."""
    if math.isnan(target):
        raise LichenError("the target is not a number", where="target")
    sign = 1 if higher else -1
    if start is not None and sign * start >= sign * target:
        return 0, 0
    if not any(metric in report.metrics for report in reports):
        raise LichenError(f"no round has {metric!r}", where="target", fix="validate, or name another metric")
    for place, report in enumerate(reports, 1):
        # A value that is not a number is neither above nor below anything.
        if sign * report.metrics.get(metric, math.nan) >= sign * target:
            return report.round, place
    return None
