"""Extra numbers of a run of task prefer: scores over all rows with their spread, and the length of what is preferred.

Legend: N clients, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lichen.core.seeds import derive, numpy_generator
from lichen.recipes.assemble.column import Column
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["preference_numbers"]

RESAMPLES = 1000
SHARE = 0.95
"""Of resamples that an interval holds."""


def preference_numbers(recipe: Recipe, columns: Mapping[str, Column]) -> dict[str, float | str | None]:
    """Each metric over everybody's test rows together, for every column; of ranking, how far it moves with the clients.

    ``<column>.preference.low`` and ``.high`` hold 95 % of what it is for clients drawn with replacement, as the seed
    says. ``length.chosen`` is the mean of the better answers' tokens, ``<column>.length`` that of the answers that the
    column ranks above.
    """
    out: dict[str, float | str | None] = {}
    task = task_of(recipe.task)
    metric = task.metric_of("preference")
    for name, column in columns.items():
        if not column.metrics:
            continue
        total = {key: x_N.sum(0, keepdim=True) for key, x_N in column.metrics.items()}
        value = {one.name: float(one.values(total)[0]) for one in task.metrics}
        out |= {f"{name}.{key}": None if math.isnan(x) else x for key, x in value.items()}
        if column.summed is not None or math.isnan(value[metric.name]):
            continue
        clients = next(iter(column.metrics.values())).shape[0]
        client_SN = numpy_generator(derive(recipe.seed, "bootstrap")).integers(clients, size=(RESAMPLES, clients))
        counts_SN = torch.from_numpy((client_SN[:, :, None] == torch.arange(clients).numpy()).sum(1)).double()
        sums = {key: torch.einsum("sn,n...->s...", counts_SN, x_N.double()) for key, x_N in column.metrics.items()}
        scores_S = metric.values(sums)
        scores_S = scores_S[~scores_S.isnan()].sort().values  # clients may be drawn that have nothing to rank
        tail = round(len(scores_S) * (1 - SHARE) / 2)
        out[f"{name}.preference.low"] = float(scores_S[tail])
        out[f"{name}.preference.high"] = float(scores_S[len(scores_S) - 1 - tail])
        if "pairs" in column.metrics and (pairs := float(column.metrics["pairs"].sum())):
            out["length.chosen"] = float(column.metrics["pair_tokens"].sum()) / pairs
            out[f"{name}.length"] = float(column.metrics["preferred_tokens"].sum()) / pairs
    return out
