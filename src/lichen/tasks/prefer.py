"""Task ``prefer``: adapt a language model to what people prefer, from pairs of answers or rated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lichen.core.conventions.bins import Bins
from lichen.tasks.chat import CHAT
from lichen.tasks.task import Metric, Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PREFER"]


def _ranked(sums: Mapping[str, Tensor], pairs: str, good: str, bad: str) -> Tensor:
    """How often the better of two answers is above the worse one: of each pair, or of each good row and each bad one.

    Not-a-number of a client without a pair, or without good or bad rows: it has nothing to rank.
    """
    from lichen.models.preference.objective import area

    if pairs in sums:
        return sums[pairs] / sums["pairs"]
    return area(sums[good], sums[bad])


def _preference_N(sums: Mapping[str, Tensor]) -> Tensor:
    return _ranked(sums, "right", "good_K", "bad_K")


def _likelihood_N(sums: Mapping[str, Tensor]) -> Tensor:
    return _ranked(sums, "likelier", "good_mean_K", "bad_mean_K")


def _perplexity_N(sums: Mapping[str, Tensor]) -> Tensor:
    value_N = (sums["nll"] / sums["tokens"]).exp().nan_to_num(math.inf, posinf=math.inf)
    return value_N.where(sums["tokens"] > 0, math.nan)


SHARES = Bins(low=0.0, high=1.0, count=200)
PERPLEXITY = CHAT.metric_of("perplexity")

PREFER = Task(
    name="prefer",
    summary="a language model learns which answers people prefer",
    metrics=(
        Metric(name="preference", higher_is_better=True, values=_preference_N, bins=SHARES, of_all=False),
        Metric(name="likelihood", higher_is_better=True, values=_likelihood_N, bins=SHARES, of_all=False),
        Metric(name="perplexity", higher_is_better=False, values=_perplexity_N, bins=PERPLEXITY.bins, of_all=False),
    ),
    metric="preference",
    labels=None,
    students=False,
    prefers=True,
    peft="CAUSAL_LM",
    pipeline="text-generation",
)
