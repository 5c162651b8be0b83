"""Early stopping by client: each keeps its parameters of least validation loss.

Training alone is judged fairly only if everybody may stop at their own best round. This work
evaluates the private ``params/`` and, where they beat ``best_value``, copies them to ``best/``. Only
losses and counts leave.

A client without validation rows has nothing to compare by, and keeps the newest. Repeating the work
changes nothing: a value must be strictly better to be taken.

The private state is versioned by job: this work reads what is newest at the job's version and stages
its own as the version after. A round that trains and then keeps the best therefore takes two versions.

References:
    Lutz Prechelt. "Early Stopping - But When?" Neural Networks: Tricks of the Trade, Springer 1998.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from lichen.clients.evaluation.evaluate import Evaluate, EvaluateState, Form
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.expected import Expected, MetricSpec, within
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["KeepBest"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBestState:
    """A block of clients being judged: the evaluation, and the private state as it came."""

    judged: EvaluateState
    own_C: Tree


@final
@dataclass(frozen=True, slots=True)
class KeepBest:
    """Personal validation which remembers the best, as a client work.

    Args:
        model: Runs C clients at once.
        form: What a client computes with, where that is more than its own tensors; these are what it keeps.
    """

    model: CohortModel
    form: Form | None = None

    @property
    def _evaluate(self) -> Evaluate:
        return Evaluate(self.model, personal=True, form=self.form)

    def expected(self, job: Job) -> Expected:
        """Those of the evaluation, the best mean loss, and whether this is it."""
        judged = self._evaluate.expected(job)
        return replace(judged, metrics={**judged.metrics, **self._specs()})

    def _specs(self) -> dict[str, MetricSpec]:
        mean = replace(self.model.objective.specs()["loss_sum"], per="")
        return {"best_value": mean, "improved": MetricSpec(0.0, 1.0)}

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> KeepBestState:
        """The clients' own parameters, or the shared ones at their first time."""
        judged = self._evaluate.init(job, clients, own_C)
        return KeepBestState(judged=judged, own_C=dict(own_C or {}))

    def step(self, state: KeepBestState, batch: Batch) -> KeepBestState:
        """The sums with one more validation batch in them."""
        return replace(state, judged=self._evaluate.step(state.judged, batch))

    def final(self, state: KeepBestState) -> tuple[Message, Tree | None]:
        """Metrics, with ``best_value`` and ``improved`` (0 or 1) beside the sums; and the private state.

        A client that has no value yet tells the most that it may.

        The private state gains ``best/...``, ``best_value`` (mean loss, float64 ``(C,)``) and
        ``best_version`` (int64 ``(C,)``, the job's version at which it was judged).
        """
        message, _ = self._evaluate.final(state.judged)
        loss_C, count_C = state.judged.sums["loss_sum"], state.judged.sums["count"]
        inf_C = torch.full_like(loss_C, torch.inf)
        value_C = torch.where(loss_C.isfinite() & (count_C > 0), loss_C / count_C.clamp(min=1), inf_C)
        before_C = state.own_C.get("best_value", inf_C).to(value_C)
        better_C = (value_C < before_C) | (count_C == 0)
        if "best_value" not in state.own_C:
            better_C = torch.ones_like(better_C)
        mine, _ = trees.split(state.own_C, "params/")
        now_C = {name: x for name, x in state.judged.params_C.items() if not mine or name in mine}
        best_C, _ = trees.split(state.own_C, "best/")
        best_C = trees.map_tree(
            lambda new, old: torch.where(better_C.view(-1, *[1] * (new.dim() - 1)), new, old), now_C, best_C or now_C
        )
        version_C = message.version_C.to(value_C.device)
        own_C = {
            **trees.join("best/", best_C, state.own_C),
            "best_value": torch.where(better_C, value_C, before_C),
            "best_version": torch.where(better_C, version_C, state.own_C.get("best_version", version_C)),
        }
        more = within({"best_value": own_C["best_value"], "improved": better_C.to(torch.float64)}, self._specs())
        return replace(message, metrics={**message.metrics, **more}), own_C
