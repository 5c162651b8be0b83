"""Makes the message of a whole model from those of a client's ends and of the server's middle.

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lichen.core import tree as trees
from lichen.core.message import Job, Message

__all__ = ["joined"]


def joined(ends: Message, middle: Message, job: Job) -> Message:
    """The message of the whole; zeros where either side's numbers have not stayed finite."""
    tensors = {**ends.tensors, **middle.tensors}
    tensors = {name: tensors[name] for name in job.shared.trainable if name in tensors}
    failed_C = (ends.metrics["failed"] > 0) | (middle.metrics["failed"].to(ends.metrics["failed"]) > 0)
    if not bool(failed_C.any()):
        return replace(ends, tensors=tensors)
    metrics = {name: torch.zeros_like(x_C) for name, x_C in ends.metrics.items()}
    metrics["failed"] = torch.ones_like(metrics["failed"])
    return replace(ends, tensors=trees.zeros_like(tensors), metrics=metrics, weight_C=torch.zeros_like(ends.weight_C))
