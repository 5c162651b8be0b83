"""Rounds and bytes to a target: the first time it is met, whichever way is better, and never if never."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.present.target import bytes_to, rounds_to, seconds_to


def told(number: int, *, up: int = 10, down: int = 100, **metrics: float) -> Report:
    return Report(round=number, clients=(0,), metrics=metrics, tokens=1, bytes_up=up, bytes_down=down, seconds=1.0)


CURVE = [
    told(1, valid=2.0),
    told(2),
    told(3, valid=1.0, up=20),
    told(4, valid=1.5, accuracy=0.5),
    told(5, valid=math.nan, accuracy=0.9),
    told(6, valid=0.5),
]


@pytest.mark.parametrize(
    ("target", "rounds", "sent"), [(2.0, 1, 110), (1.2, 3, 340), (1.0, 3, 340), (0.6, 6, 670), (0.4, None, None)]
)
def test_the_first_round_at_the_target_counts_with_all_bytes_until_then(
    target: float, rounds: int | None, sent: int | None
) -> None:
    assert (rounds_to(CURVE, target), bytes_to(CURVE, target)) == (rounds, sent)
    assert rounds_to(reversed(CURVE), target) == rounds


def test_more_may_be_better_and_the_start_may_do() -> None:
    assert rounds_to(CURVE, 0.8, metric="accuracy", higher=True) == 5
    assert rounds_to(CURVE, 0.95, metric="accuracy", higher=True) is None
    assert (rounds_to(CURVE, 1.2, start=1.1), bytes_to(CURVE, 1.2, start=1.1)) == (0, 0)
    assert (rounds_to(CURVE, 1.2, start=1.3), bytes_to(CURVE, 1.2, start=1.3)) == (3, 340)


def test_a_round_told_twice_counts_once_as_told_last() -> None:
    twice = [*CURVE[:2], told(2, valid=0.1, down=50), *CURVE[2:]]
    assert (rounds_to(twice, 1.0), bytes_to(twice, 1.0)) == (2, 170)


def test_what_is_no_question_is_refused() -> None:
    with pytest.raises(LichenError, match="no round has 'perplexity'"):
        rounds_to(CURVE, 1.0, metric="perplexity")
    with pytest.raises(LichenError, match="not a number"):
        bytes_to(CURVE, math.nan)


def test_seconds_are_the_clocks_where_there_is_one() -> None:
    walls = [Report(round=r, clients=(), metrics={"valid": 4.0 - r}, seconds=2.0) for r in range(1, 4)]
    assert seconds_to(walls, 2.0) == 4.0
    assert seconds_to(walls, 0.5) is None
    assert seconds_to(walls, 2.0, start=1.0) == 0.0
    timed = [replace(report, metrics={**report.metrics, "time": 100.0 * report.round}) for report in walls]
    assert seconds_to(timed, 2.0) == 200.0
