"""Task ``classify``: tell which class a text or a picture belongs to, with a foundation model or a small student."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lichen.core.conventions.bins import Bins
from lichen.core.errors import LichenError
from lichen.tasks.task import Given, Labels, Metric, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lichen.models.objectives import RowObjective

__all__ = ["ACCURACY", "CLASSES", "CLASSIFY", "MACRO_F1"]

MOST_CLASSES = 20
"""So many classes may lie in few rows each, or be numbers with fractions, such as half stars."""


def _names(labels: Sequence[Given]) -> tuple[str, ...]:
    """The labels, sorted.

    Raises:
        LichenError: where there are not at least two, or rows have none.
    """
    from lichen.data.batches.text import sorted_labels

    classes, unlabelled = sorted_labels(labels), sum(label is None for label in labels)
    if classes and unlabelled:
        raise LichenError(
            f"{unlabelled} of {len(labels)} rows have no label",
            where="data.columns.label",
            fix="label them, leave them out of the file, or name the labels to keep in data.classes",
        )
    if len(classes) < 2:
        raise LichenError(
            f"the label column holds {len(classes)} class",
            where="data.columns.label",
            fix="name a column with two or more",
        )
    if len(classes) > MOST_CLASSES and _are_measures(classes):
        raise LichenError(
            f"the label column holds {len(classes)} numbers with fractions, such as {classes[0]}: that is regression",
            where="data.columns.label",
            fix="write a column of few classes, such as low, middle and high, and name it; or list data.classes",
        )
    if len(classes) > MOST_CLASSES and 2 * len(classes) > len(labels):
        raise LichenError(
            f"the label column holds {len(classes)} classes in {len(labels)} rows",
            where="data.columns.label",
            fix="name a column in which classes repeat, or list data.classes",
        )
    return classes


def _are_measures(classes: Sequence[str]) -> bool:
    """Numbers, and not all of them whole."""
    try:
        return any(not float(name).is_integer() for name in classes)
    except ValueError:
        return False


def _encode(labels: Sequence[Given], names: Sequence[str]) -> np.ndarray:
    import numpy as np

    from lichen.core.conventions.labels import NO_CLASS

    index = {name: i for i, name in enumerate(names)}
    return np.asarray([NO_CLASS if label is None else index[str(label)] for label in labels], dtype=np.int64)


def _objective(names: Sequence[str]) -> RowObjective:
    from lichen.models.objectives import Classification

    return Classification(len(names))


def _most_frequent(labels_N: np.ndarray, names: Sequence[str]) -> np.ndarray:
    import numpy as np

    count_K = np.bincount(labels_N[labels_N >= 0], minlength=len(names))
    return np.asarray(np.arange(len(names)) == count_K.argmax(), dtype=np.float32)


def _likeliest(outputs_K: Tensor, names: Sequence[str]) -> str:
    chance_K = outputs_K.softmax(-1)
    order = chance_K.argsort(descending=True).tolist()
    return ", ".join(f"{names[k]} {float(chance_K[k]):.0%}" for k in order[:3])


CLASSES = Labels(
    names=_names,
    encode=_encode,
    objective=_objective,
    constant=_most_frequent,
    describe=_likeliest,
    baseline="majority",
    classes=True,
)
"""A label is the name of a row's class."""


def _each(sums: Mapping[str, Tensor], value: Callable[[Tensor], float]) -> Tensor:
    import torch

    return torch.tensor([value(confusion) for confusion in sums["confusion"]], dtype=torch.float64)


def _accuracy_N(sums: Mapping[str, Tensor]) -> Tensor:
    from lichen.clients.evaluation.metrics import accuracy

    return _each(sums, accuracy)


def _macro_f1_N(sums: Mapping[str, Tensor]) -> Tensor:
    from lichen.clients.evaluation.metrics import macro_f1

    return _each(sums, macro_f1)


SHARES = Bins(low=0.0, high=1.0, count=200)

ACCURACY = Metric(name="accuracy", higher_is_better=True, values=_accuracy_N, bins=SHARES)
MACRO_F1 = Metric(name="macro_f1", higher_is_better=True, values=_macro_f1_N, bins=SHARES)

CLASSIFY = Task(
    name="classify",
    summary="a foundation model or a small student learns the classes of the clients' rows",
    metrics=(ACCURACY, MACRO_F1),
    metric="macro_f1",
    labels=CLASSES,
    help=frozenset({"teacher", "synthetic", "semi", "exchange"}),
)
