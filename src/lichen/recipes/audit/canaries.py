"""Guesses which canaries a finished run was trained on, and says how large ε must be at least for that.

The guesser has the model that was learned and the one that it began as. A canary's score is how much its loss has
fallen between the two; those that are in should have fallen more.

Legend: M canaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from lichen.audit.exposure import exposure
from lichen.audit.one_run import Bound, bounded
from lichen.audit.row_scores import row_scores
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.sides.canaries import Canaries

__all__ = ["FoundCanaries", "found_canaries"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCanaries:
    """What canaries show.

    Attributes:
        canaries: How many there are.
        included: Of them, those that were trained on.
        exposure: Bits of those, in the median; 1 where nothing sets them apart.
        exposure_most: Of the one that is most exposed.
        exposure_full: That as many canaries allow.
        bound: The least ε that fits the guesses, at 95 % confidence.
        delta: δ of the statement that it is held against; 0 where nothing is promised.
        promised: ε of the run, where one is.
        unit: What the run hides; empty: nothing.
    """

    canaries: int
    included: int
    exposure: float
    exposure_most: float
    exposure_full: float
    bound: Bound
    delta: float
    promised: float | None
    unit: str


def found_canaries(
    experiment: Experiment,
    canaries: Canaries,
    shared: Shared,
    *,
    delta: float = 0.0,
    promised: float | None = None,
    unit: str = "",
) -> FoundCanaries:
    """What a model says of the canaries.

    Args:
        experiment: The run's, opened again.
        canaries: Its canaries.
        shared: What it has learned.
        delta: δ of what was promised.
        promised: ε of it.
        unit: What is hidden.

    Raises:
        LichenError: if all are in, or none: no coin could tell anything.
    """
    score_M = _losses(experiment, canaries, experiment.start) - _losses(experiment, canaries, shared)
    included_M = np.array(canaries.included_M, dtype=np.bool_)
    if included_M.all() or not included_M.any():
        raise LichenError("all coins fell on one side", where="audit.canaries", fix="make a run with more")
    # A loss that is no number has told nothing.
    score_M = np.nan_to_num(score_M, nan=0.0)
    bits_M = exposure(score_M[included_M], score_M[~included_M])
    return FoundCanaries(
        canaries=len(score_M),
        included=int(included_M.sum()),
        exposure=float(np.median(bits_M)),
        exposure_most=float(bits_M.max()),
        exposure_full=float(np.log2((~included_M).sum() + 1)),
        bound=bounded(torch.from_numpy(score_M), torch.from_numpy(included_M), delta=delta),
        delta=delta,
        promised=promised,
        unit=unit,
    )


def _losses(experiment: Experiment, canaries: Canaries, shared: Shared) -> NDArray[np.float64]:
    order: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in experiment.evaluating([canaries.rows]).batches((0,), 0):
            order.extend(int(row) for row in batch["index_CB"][0].tolist() if row >= 0)
            yield batch

    score = row_scores(experiment.model, shared.trainable, shared.fixed, batches())["loss"]
    loss_M = np.empty(len(order))
    loss_M[order] = -score
    return loss_M
