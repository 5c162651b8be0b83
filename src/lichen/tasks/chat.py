"""Task ``chat``: adapt a language model to texts, prompts with answers, or whole conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lichen.tasks.task import Metric, Task

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHAT"]


def _perplexity_N(sums: Mapping[str, Tensor]) -> Tensor:
    return (sums["loss_sum"] / sums["count"]).exp()


PERPLEXITY = Metric(name="perplexity", higher_is_better=False, values=_perplexity_N)

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
