"""Two tiny cohort models: softmax regression, and a frozen linear layer with LoRA and a patch.

Legend: C clients, B rows, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.models.objectives import Classification, NextToken


def _loss(logits_CBK: Any, labels_CB: Any) -> Any:
    pairs = zip(logits_CBK, labels_CB, strict=True)
    losses = [functional.cross_entropy(x, y, ignore_index=-100, reduction="sum") for x, y in pairs]
    return torch.stack(losses), (labels_CB >= 0).sum(1)


@dataclass(frozen=True)
class Softmax:
    features: int = 5
    classes: int = 3
    name: str = "softmax"
    base: str = ""
    group: str = "softmax"
    reference: bool = True
    dtype: torch.dtype = torch.float64

    @property
    def objective(self) -> Classification:
        return Classification(self.classes)

    def init(self, seed: int) -> Any:
        g = torch_generator(seed, "softmax")
        return {
            "weight": torch.randn(self.classes, self.features, generator=g, dtype=self.dtype) * 0.1,
            "bias": torch.zeros(self.classes, dtype=self.dtype),
        }

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        # Client by client, so that no kernel sees the company.
        W, b = trainable_C["weight"], trainable_C["bias"]
        return torch.stack([functional.linear(x, W[c], b[c]) for c, x in enumerate(batch["x_CBF"].to(W))])

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        return _loss(self.logits(trainable_C, fixed, batch), batch["labels_CB"])


@dataclass(frozen=True)
class LoraLinear:
    features: int = 6
    classes: int = 4
    rank: int = 2
    scaling: float = 2.0
    name: str = "lora"
    base: str = "lora-base"
    group: str = "lora"
    reference: bool = True

    @property
    def objective(self) -> Classification:
        return Classification(self.classes)

    def init(self, seed: int) -> Any:
        g = torch_generator(seed, "lora")
        return {
            "layer.lora_A": torch.randn(self.rank, self.features, generator=g),
            "layer.lora_B": torch.zeros(self.classes, self.rank),
        }

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        W = torch.randn(self.classes, self.features, generator=torch_generator(0, "base"))
        if "patch.layer.dense" in fixed:
            W = W + fixed["patch.layer.dense"]
        elif "patch.layer.left" in fixed:
            W = W + fixed["patch.layer.left"] @ fixed["patch.layer.right"]
        A, B = trainable_C["layer.lora_A"], trainable_C["layer.lora_B"]
        return torch.stack([x @ W.T + self.scaling * x @ A[c].T @ B[c].T for c, x in enumerate(batch["x_CBF"])])

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        return _loss(self.logits(trainable_C, fixed, batch), batch["labels_CB"])


@dataclass(frozen=True)
class Bigram:
    """A language model of one table: the next token's logits given this token."""

    vocabulary: int = 5
    name: str = "bigram"
    base: str = ""
    group: str = "bigram"
    reference: bool = True
    classes: None = None
    objective = NextToken()

    def init(self, seed: int) -> Any:
        return {"table": torch.zeros(self.vocabulary, self.vocabulary)}

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
        losses, counts = [], []
        for table, ids, labels in zip(trainable_C["table"], batch["input_ids_CBT"], batch["labels_CBT"], strict=True):
            logits, wanted = table[ids[:, :-1]].flatten(0, 1), labels[:, 1:].flatten()
            losses.append(functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"))
            counts.append((wanted >= 0).sum())
        return torch.stack(losses), torch.stack(counts)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> None:
        raise LichenError("a language model's logits are never held whole")


def rows(seed: int, clients: int, *, count: int = 4, features: int = 5, classes: int = 3, active: Any = None) -> Any:
    """A batch of labelled rows; client c's rows depend on (seed, client) alone."""
    gs = [torch_generator(seed, client) for client in clients]
    return {
        "active_C": torch.ones(len(clients), dtype=torch.bool) if active is None else torch.tensor(active),
        "x_CBF": torch.stack([torch.randn(count, features, generator=g) for g in gs]),
        "labels_CB": torch.stack([torch.randint(0, classes, (count,), generator=g) for g in gs]),
        "index_CB": torch.arange(count).repeat(len(clients), 1),
    }


def job(shared: Tree | Shared, clients: int, **more: Any) -> Any:
    shared = shared if isinstance(shared, Shared) else Shared.of_flat(shared)
    return Job(**{"work": "w", "shared": shared, "version": 0, "clients": tuple(clients), "seed": 1, **more})


def fold(work: Any, job: Any, batches: Any, own_C: Any = None) -> Any:
    state = work.init(job, job.clients, own_C)
    for batch in batches:
        state = work.step(state, batch)
    return work.final(state)
