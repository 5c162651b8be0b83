"""Who gains by a column and who is harmed, beside another: on average, by share, by number of rows, and if by chance.

A mean over clients rises while some of them sink, so each comparison says for how many it fell. Whether the difference
may be chance is tested over clients, in pairs; whether those with few rows gain more is a rank correlation.

References:
    Frank Wilcoxon. "Individual Comparisons by Ranking Methods." Biometrics Bulletin 1(6), 1945.
    https://doi.org/10.2307/3001968
    Tian Li, Shengyuan Hu, Ahmad Beirami and Virginia Smith. "Ditto: Fair and Robust Federated Learning Through
    Personalization." ICML 2021. https://arxiv.org/abs/2012.04221 (fairness as the spread over clients)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Gain", "gains_of", "gains_text", "harmed_below"]

AGAINST = ("base", "alone", "alone_best")
"""What a client could have had without the others: the bare model, and training by itself."""

GAINING = ("federated", "personal", "chosen")
"""What it gets by taking part."""

LEAST = 3
"""Clients with both scores that a rank correlation and a test need."""


class Gain(BaseModel):
    """How one column stands beside another, over the clients that have both scores."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    clients: Annotated[int, Field(ge=0, lt=2**63)]
    gaining: Annotated[float, Field(ge=0, le=1)]
    """Share of the clients with a better score."""
    harmed: Annotated[float, Field(ge=0, le=1)]
    """Share with a worse one."""
    mean: float
    """Gain, positive where the score is better."""
    least: float
    spread: Annotated[float, Field(ge=0)] | None
    """Sample standard deviation of the column's scores over clients; null for one client."""
    p: Annotated[float, Field(ge=0, le=1)] | None
    """Of no difference, by Wilcoxon's signed ranks of the pairs, two-sided; null where it says nothing."""
    by_rows: Annotated[float, Field(ge=-1, le=1)] | None
    """Spearman's correlation of gain with training rows; null where it says nothing."""


def gains_of(
    scores: Mapping[str, Sequence[float]], rows: Sequence[int | None], *, higher_is_better: bool
) -> dict[str, dict[str, dict[str, Any]]]:
    """How each column that clients get stands beside each that they could have had.

    Args:
        scores: By column, one a client; not-a-number of who has none.
        rows: Each client's training rows, as far as known; none at all where nobody's are.
        higher_is_better: What a gain is.

    Returns:
        By column and the one that it is held against: ``clients`` with both scores; the share ``gaining`` and the share
        ``harmed``; the ``mean`` and the ``least`` gain; ``spread``, the sample standard deviation of its scores
        (null for one client); ``p``, of no difference (Wilcoxon's signed ranks, two-sided), and ``by_rows``, Spearman's
        correlation of gain with rows; null where they say nothing.

    >>> found = gains_of({"alone": [0.5, 0.5, 0.6], "federated": [0.7, 0.4, 0.9]}, (), higher_is_better=True)
    >>> {key: round(value, 3) for key, value in found["federated"]["alone"].items() if key in ("gaining", "harmed")}
    {'gaining': 0.667, 'harmed': 0.333}
    """
    return {
        mine: {
            other: _gain(scores[mine], scores[other], rows, higher_is_better)
            for other in AGAINST
            if scores.get(other) and _both(scores[mine], scores[other])
        }
        for mine in GAINING
        if scores.get(mine) and any(scores.get(other) and _both(scores[mine], scores[other]) for other in AGAINST)
    }


def _both(mine: Sequence[float], others: Sequence[float]) -> list[int]:
    """The clients that have both scores."""
    return [at for at, pair in enumerate(zip(mine, others, strict=True)) if all(map(math.isfinite, pair))]


def _gain(
    mine: Sequence[float], others: Sequence[float], rows: Sequence[int | None], higher_is_better: bool
) -> dict[str, Any]:
    both, sign = _both(mine, others), 1.0 if higher_is_better else -1.0
    gains = [sign * (mine[at] - others[at]) for at in both]
    known = [(gain, rows[at]) for gain, at in zip(gains, both, strict=True) if rows and rows[at] is not None]
    return {
        "clients": len(both),
        "gaining": sum(gain > 0 for gain in gains) / len(both),
        "harmed": sum(gain < 0 for gain in gains) / len(both),
        "mean": math.fsum(gains) / len(both),
        "least": min(gains),
        "spread": statistics.stdev(mine[at] for at in both) if len(both) > 1 else None,
        "p": _p(gains),
        "by_rows": _spearman(*zip(*known, strict=True)) if len(known) >= LEAST else None,
    }


def _p(gains: Sequence[float]) -> float | None:
    """Of no difference; None of too few, or where nothing differs."""
    from scipy import stats

    if len(gains) < LEAST or not any(gains):
        return None
    return float(stats.wilcoxon(gains).pvalue)


def _spearman(some: Sequence[float], others: Sequence[float]) -> float | None:
    """None where one of the two is constant."""
    from scipy import stats

    if len(set(some)) < 2 or len(set(others)) < 2:
        return None
    return float(stats.spearmanr(some, others).statistic)


def harmed_below(mine: Mapping[str, float | None], *, higher_is_better: bool) -> str:
    """The columns that a client's federated score is worse than, in words; empty where it is worse than none.

    Args:
        mine: The client's scores by column; None where it has none.
        higher_is_better: What worse means.

    >>> harmed_below({"base": 0.5, "alone": 0.7, "federated": 0.6}, higher_is_better=True)
    'alone'
    """
    got, sign = mine.get("federated"), 1.0 if higher_is_better else -1.0
    if got is None:
        return ""
    known = {name: mine.get(name) for name in AGAINST}
    return " ".join(name for name, score in known.items() if score is not None and sign * (got - score) < 0)


def gains_text(gain: Mapping[str, Any]) -> str:
    """One comparison in a line.

    Args:
        gain: As :func:`gains_of` gives it.
    """
    many = gain["clients"]
    harmed = round(gain["harmed"] * many)
    parts = [f"{round(gain['gaining'] * many)} of {many} gain, {harmed} {'is' if harmed == 1 else 'are'} harmed"]
    if gain["p"] is not None:
        parts.append(f"p = {gain['p']:.2g} of no difference")
    if gain["by_rows"] is not None:
        parts.append(f"gain and number of rows: rank correlation {gain['by_rows']:.2f}")
    return "; ".join(parts)
