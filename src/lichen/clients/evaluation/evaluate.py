"""Evaluates shared or personal parameters on a client's rows; sums and counts leave.

A language model's perplexity is ``exp(loss_sum / count)`` per client, or over all of them. For a
classifier the loss is the plain cross-entropy of its logits, whatever it was trained with, so that
methods compare; the confusion counts give accuracy and macro F1 (:mod:`lichen.clients.evaluation.metrics`).

Legend: C clients, B rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.expected import Expected, within
from lichen.core.message import Job, Message
from lichen.core.parameters import personal_C
from lichen.core.tree import Tree

__all__ = ["Evaluate", "EvaluateState", "Form", "measure"]

Form = Callable[[Tree, Tree, Tree], Tree]
"""From ``(shared tensors, clients' own in their place, private state)``, the last two with a client axis, to the
tensors that clients compute with."""


def measure(model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
    """Float64 sums over one batch: ``loss_sum`` and ``count`` ``(C,)``, and a classifier's ``confusion`` ``(C, K, K)``.

    Rows with label -100 or index -1, and inactive clients, count for nothing.
    """
    device = next(iter(params_C.values())).device
    active_C = batch["active_C"].to(device)
    with torch.no_grad():
        sums = model.objective.sums(model, params_C, fixed, batch)
        return {name: torch.where(_along(active_C, x), x, torch.zeros_like(x)).double() for name, x in sums.items()}


def _along(active_C: Tensor, x: Tensor) -> Tensor:
    return active_C.view(-1, *[1] * (x.dim() - 1))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateState:
    """A block of clients in the middle of an evaluation; ``sums`` as :func:`measure` gives them.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        params_C: Each client's tensors, by the shared ones' names.
        model_C: What it computes with: these, or what a form has made of them.
        fixed: Shared tensors without client axis.
        sums: So far.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    model_C: Tree
    fixed: Tree
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluation as a client work; no tensor leaves, and no private state is written.

    Args:
        model: Runs C clients at once.
        personal: Evaluate each client's own parameters where it has some, else the shared ones.
        use_best: With ``personal``: its best ones so far, where it has kept some.
        form: With ``personal``: what a client computes with, where that is more than its own tensors.
    """

    model: CohortModel
    _: KW_ONLY
    personal: bool = False
    use_best: bool = False
    form: Form | None = None

    def expected(self, job: Job) -> Expected:
        """The objective's sums, and no tensor."""
        return Expected(group=self.model.group, metrics=self.model.objective.specs())

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> EvaluateState:
        """Parameters to judge, and sums at zero."""
        trainable, fixed = job.shared.trainable, job.shared.fixed
        if self.model.reference and not self.personal:
            params_C = trees.expand(trainable, len(clients))  # every client is a call of its own, and only reads
        else:
            params_C = personal_C(trainable, own_C if self.personal else None, len(clients), use_best=self.use_best)
        model_C = params_C if self.form is None else self.form(trainable, params_C, dict(own_C or {}))
        shapes = self.model.objective.shapes()
        device = next(iter(params_C.values())).device
        return EvaluateState(
            job=job,
            clients=tuple(clients),
            params_C=params_C,
            model_C=model_C,
            fixed=fixed,
            sums={k: torch.zeros(len(clients), *s, dtype=torch.float64, device=device) for k, s in shapes.items()},
        )

    def step(self, state: EvaluateState, batch: Batch) -> EvaluateState:
        """The sums with one more batch in them."""
        more = measure(self.model, state.model_C, state.fixed, batch)
        return replace(state, sums={name: total + more[name] for name, total in state.sums.items()})

    def final(self, state: EvaluateState) -> tuple[Message, Tree | None]:
        """A message of metrics alone, weighed by the labelled rows or tokens."""
        message = Message(
            group=self.model.group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={},
            weight_C=state.sums["count"],
            metrics=within(state.sums, self.model.objective.specs()),
        )
        return message, None
