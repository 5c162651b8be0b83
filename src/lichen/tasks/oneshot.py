"""Task ``oneshot``: solve for a classifier's head on frozen features, in one round and in closed form."""

from __future__ import annotations

from lichen.tasks.classify import ACCURACY, CLASSES, MACRO_F1
from lichen.tasks.task import STATISTICS, Task

__all__ = ["ONESHOT"]

ONESHOT = Task(
    name="oneshot",
    summary="a closed-form head on a frozen encoder, equal to pooled training, in one round",
    metrics=(ACCURACY, MACRO_F1),
    metric="macro_f1",
    labels=CLASSES,
    students=False,
    procedure=STATISTICS,
)
