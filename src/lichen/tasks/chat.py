"""Task ``chat``: adapt a language model to texts, prompts with answers, or whole conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lichen.core.conventions.bins import Bins
from lichen.tasks.task import Metric, Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHAT"]


def _perplexity_N(sums: Mapping[str, Tensor]) -> Tensor:
    return (sums["loss_sum"] / sums["count"]).exp()


PERPLEXITY = Metric(
    name="perplexity",
    higher_is_better=False,
    values=_perplexity_N,
    bins=Bins(low=1.0, high=2.0**20, count=480, ratio=True),
)
"""A bin is 2.9 % wide."""

CHAT = Task(
    name="chat",
    summary="a language model learns to write as the clients' rows do",
    metrics=(PERPLEXITY,),
    metric="perplexity",
    labels=None,
    students=False,
    help=frozenset({"teacher"}),
    peft="CAUSAL_LM",
    pipeline="text-generation",
)
