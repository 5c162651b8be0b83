"""What every training work tells of its steps: four sums and whether it failed; and what a server may expect of them.

``loss_sum`` and ``count`` are of the labelled rows or tokens seen, ``tokens`` of all attended ones, ``steps`` of the
steps taken; ``failed`` is 1 where a client's numbers did not stay finite, and all else is then zero.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from lichen.core.contracts import CohortModel
from lichen.core.expected import COUNT, FAILED, Expected, MetricSpec, TensorSpec, within
from lichen.core.tree import Tree

__all__ = ["WeighBy", "training_expected", "training_metrics"]

WeighBy = Literal["examples", "tokens", "one"]
"""What a client's weight counts: labelled rows or tokens seen, attended ones, or nothing: all alike."""


def training_expected(
    model: CohortModel, tensors: Mapping[str, TensorSpec], weigh_by: WeighBy = "examples"
) -> Expected:
    """What the message of a training work must be.

    Args:
        model: What is trained.
        tensors: What leaves.
        weigh_by: What a client's weight counts.
    """
    return Expected(
        group=model.group,
        tensors=tensors,
        metrics={"loss_sum": _loss(model), "count": COUNT, "tokens": COUNT, "steps": COUNT, "failed": FAILED},
        weight=(0.0, 1.0) if weigh_by == "one" else (0.0, COUNT.high),
    )


def training_metrics(model: CohortModel, metrics_C: Mapping[str, Tensor]) -> Tree:
    """The metrics of honest clients, the loss cut to what is expected of it."""
    return within(metrics_C, {"loss_sum": _loss(model)})


def _loss(model: CohortModel) -> MetricSpec:
    return model.objective.specs()["loss_sum"]
