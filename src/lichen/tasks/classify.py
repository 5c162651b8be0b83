"""Task ``classify``: tell which class a text or a picture belongs to, with a foundation model or a small student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lichen.tasks.task import Metric, Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ACCURACY", "CLASSIFY", "MACRO_F1"]


def _each(sums: Mapping[str, Tensor], value: Callable[[Tensor], float]) -> Tensor:
    import torch

    return torch.tensor([value(confusion) for confusion in sums["confusion"]], dtype=torch.float64)


def _accuracy_N(sums: Mapping[str, Tensor]) -> Tensor:
    from lichen.clients.evaluation.metrics import accuracy

    return _each(sums, accuracy)


def _macro_f1_N(sums: Mapping[str, Tensor]) -> Tensor:
    from lichen.clients.evaluation.metrics import macro_f1

    return _each(sums, macro_f1)


ACCURACY = Metric(name="accuracy", higher_is_better=True, values=_accuracy_N)
MACRO_F1 = Metric(name="macro_f1", higher_is_better=True, values=_macro_f1_N)

CLASSIFY = Task(
    name="classify",
    summary="a foundation model or a small student learns the classes of the clients' rows",
    metrics=(ACCURACY, MACRO_F1),
    metric="macro_f1",
    help=frozenset({"teacher", "synthetic", "semi", "exchange"}),
)
