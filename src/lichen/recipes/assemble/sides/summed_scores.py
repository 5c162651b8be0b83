"""How clients are scored where the server learns sums alone: their mean, their deciles by a histogram, nobody's own.

Legend: N clients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lichen.clients.masking.masked import Masked
from lichen.clients.masking.own_score import BINS, SCORE, SCORED, OwnScore
from lichen.core.contracts.client import ClientWork
from lichen.core.conventions.bins import Bins
from lichen.recipes.assemble.sides.masks import masked_sums
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["SUMMED_TEST", "SummedScores", "masked_test", "read_scores", "sums_scores"]

SUMMED_TEST = "test.sum"
"""The work by which clients score on their test rows under masks."""

LEAST_BINNED = 10
"""Clients that are counted in bins, at least: of fewer a tenth is nobody, and a bin shows one client's score."""


def sums_scores(recipe: Recipe) -> bool:
    """Whether clients that have their rows to themselves score under masks; beside noise they do not score at all."""
    return recipe.masked is not None and recipe.noised is None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SummedScores:
    """What sums say of the clients' scores.

    Attributes:
        scored: Clients that have a score and told it.
        mean: Over them; not-a-number where there are none.
        worst_decile: Mean of the worst tenth, right to half a bin; None where nothing was counted in bins.
        deciles: The nine scores that part the clients into tenths, as right; empty as above.
    """

    scored: int
    mean: float
    worst_decile: float | None = None
    deciles: tuple[float, ...] = ()


def masked_test(recipe: Recipe, work: ClientWork, clients: int) -> Masked:
    """An evaluation of so many clients on test rows, of which the server learns :class:`SummedScores`."""
    metric = task_of(recipe.task).metric_of(recipe.compare.metric)
    return masked_sums(recipe, OwnScore(work, metric.values, bins=_bins(recipe, clients)), clients)


def _bins(recipe: Recipe, clients: int) -> Bins | None:
    return task_of(recipe.task).metric_of(recipe.compare.metric).bins if clients >= LEAST_BINNED else None


def read_scores(recipe: Recipe, sums: Mapping[str, Tensor], clients: int) -> SummedScores | None:
    """Reads the sum of all clients' messages to :func:`masked_test`.

    Args:
        recipe: The recipe.
        sums: By metric, ``(1, ...)``.
        clients: N.

    Returns:
        None where numbers do not add up, so that a client has lied.
    """
    metric, bins = task_of(recipe.task).metric_of(recipe.compare.metric), _bins(recipe, clients)
    scored = float(sums[SCORED][0])
    if not 0 <= scored <= clients or not scored.is_integer():
        return None
    if not scored:
        adds_up = not any(bool(sums[name].any()) for name in (SCORE, BINS) if name in sums)
        return SummedScores(scored=0, mean=math.nan) if adds_up else None
    mean = float(sums[SCORE][0]) / scored
    if bins is None:
        return SummedScores(scored=int(scored), mean=mean)
    counts = [int(count) for count in sums[BINS][0].tolist()]
    if min(counts) < 0 or sum(counts) != scored or not bins.low <= mean <= bins.high:
        return None
    worst = bins.worst(counts, higher_is_better=metric.higher_is_better)
    deciles = bins.deciles(counts)
    return SummedScores(scored=int(scored), mean=mean, worst_decile=worst, deciles=deciles)
