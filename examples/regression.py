"""A task of one's own in one file: real numbers instead of classes.

A model gives one number a row. It is trained on the squared error and compared by the root of its mean, in the label's
own units, and by the mean absolute error; the baseline `mean` says the same number of every row. Rows may be texts or
pictures, models small students or foundation models with an adapter.

A package that holds this file declares the task in its `pyproject.toml`:

    [project.entry-points."lichen.tasks"]
    regression = "regression:REGRESSION"

Once it is installed, recipes may say `task: regression`, and nothing of Lichen changes.
"""

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.expected import MetricSpec
from lichen.models.objectives import RowLoss
from lichen.tasks.task import Labels, Metric, Task


def names(labels):
    """One output, whatever the labels are; rows without a label are allowed, and are not learned from."""
    for label in labels:
        try:
            float(label if label is not None else 0)
        except ValueError:
            fix = "name a column of numbers, or use task: classify"
            raise LichenError(f"{label!r} is no number", where="data.columns.label", fix=fix) from None
    return ("value",)


def encode(labels, names):
    return np.asarray([np.nan if label is None else float(label) for label in labels], dtype=np.float32)


def squared(outputs_RK, label_R):
    return (outputs_RK[:, 0] - label_R).square()


def absolute(outputs_RK, label_R):
    return (outputs_RK[:, 0] - label_R).abs()


REGRESSION = Task(
    name="regression",
    summary="a model learns a real number of every row",
    metrics=(
        Metric(name="rmse", higher_is_better=False, values=lambda sums: (sums["loss_sum"] / sums["count"]).sqrt()),
        Metric(name="mae", higher_is_better=False, values=lambda sums: sums["absolute"] / sums["count"]),
    ),
    metric="rmse",
    labels=Labels(
        names=names,
        encode=encode,
        objective=lambda names: RowLoss(
            squared,
            more={"absolute": absolute},
            ranges={"loss_sum": MetricSpec(0.0), "absolute": MetricSpec(0.0)},
        ),
        constant=lambda labels_N, names: np.nanmean(labels_N, keepdims=True),
        baseline="mean",
        describe=lambda outputs_K, names: f"{float(outputs_K[0]):.3g}",
    ),
)
