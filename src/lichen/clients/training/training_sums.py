"""What every training work tells of its steps: four sums and whether it failed; and what a server may expect of them.

``loss_sum`` and ``count`` are of the labelled rows or tokens seen, ``tokens`` of all attended ones, ``steps`` of the
steps taken; ``failed`` is 1 where a client's numbers did not stay finite, and all else is then zero.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.conventions.labels import has_label
from lichen.core.expected import COUNT, FAILED, Expected, MetricSpec, TensorSpec, within
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["WeighBy", "add_seen", "tokens_seen_C", "training_expected", "training_message", "training_metrics"]

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


def tokens_seen_C(batch: Batch) -> Tensor:
    """Attended tokens of each client's active batch, or its rows where there are no tokens; int64 ``(C,)``."""
    active_C = batch["active_C"]
    if "attention_mask_CBT" in batch:
        seen_CB = batch["attention_mask_CBT"].sum(2)
        if "second_mask_CBT" in batch:
            seen_CB = seen_CB + batch["second_mask_CBT"].sum(2)
        if "index_CB" in batch:  # a padding row attends to one padding token, which is nobody's
            real_CB = batch["index_CB"] >= 0
            seen_CB = seen_CB * (real_CB | (batch["answer_CB"] >= 0) if "answer_CB" in batch else real_CB)
        seen_C = seen_CB.sum(1)
    elif "index_CB" in batch:
        seen_C = (batch["index_CB"] >= 0).sum(1)
    elif "labels_CB" in batch:
        seen_C = has_label(batch["labels_CB"]).sum(1)
    else:
        seen_C = torch.zeros_like(active_C, dtype=torch.int64)
    return seen_C.to(torch.int64) * active_C


def add_seen(sums: Tree, batch: Batch, seen: Tree) -> Tree:
    """The sums with what active clients have seen in one more batch, and its tokens."""
    device = next(iter(sums.values())).device
    active_C, seen = batch["active_C"].to(device), {**seen, "tokens": tokens_seen_C(batch)}
    return {
        name: total + torch.where(active_C, seen[name].to(total), torch.zeros_like(total)) if name in seen else total
        for name, total in sums.items()
    }


def training_message(
    model: CohortModel,
    job: Job,
    clients: Sequence[int],
    tensors: Tree,
    sums: Tree,
    finite_C: Tensor,
    weigh_by: WeighBy,
) -> Message:
    """The clients' message; those that are not finite weigh nothing and count as failed."""
    metrics = {name: torch.where(finite_C, x_C, torch.zeros_like(x_C)) for name, x_C in sums.items()}
    metrics["failed"] = (~finite_C).double()
    weights = {"examples": metrics["count"], "tokens": metrics["tokens"], "one": (metrics["steps"] > 0).double()}
    return Message(
        group=model.group,
        client_C=torch.tensor(clients, dtype=torch.int64),
        version_C=torch.full((len(clients),), job.version, dtype=torch.int64),
        tensors=tensors,
        weight_C=weights[weigh_by],
        metrics=training_metrics(model, metrics),
    )


def _loss(model: CohortModel) -> MetricSpec:
    return model.objective.specs()["loss_sum"]
