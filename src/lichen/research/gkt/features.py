"""FedGKT's upload: features of a client's rows, its logits and the labels.

Research: no recipe and no public name reaches this module.

The features are what the client's small network makes of its rows, the opinion its log-probabilities.

**What leaves.** Everything the server needs to train on these rows: the labels in the clear, and features
from which rows can often be recognised, or partly rebuilt. Rows do not leave, but this is no
anonymisation. Where labels are private, exchange answers to public rows instead
(:mod:`lichen.algorithms.exchange`).

References:
    Chaoyang He, Murali Annavaram and Salman Avestimehr. "Group Knowledge Transfer: Federated Learning of
    Large CNNs at the Edge." NeurIPS 2020. https://arxiv.org/abs/2007.14513

Legend: C clients, N rows of a client, B rows of a batch, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import ANY, COUNT, FAILED, Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.parameters import personal_C
from lichen.core.tree import Tree

__all__ = ["FeatureUpload"]


class Featuring(Protocol):
    """A classifier that also tells the features below its last layer."""

    classes: int | None

    @property
    def width(self) -> int:
        """F."""
        ...

    def features(self, params_C: Tree, batch: Batch) -> Tensor:
        """``features_CBF``."""
        ...

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK``."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureUploadState:
    """One client part way through its rows; ``parts`` are ``(index_B, features_BF, logp_BK, labels_B)``."""

    job: Job
    client: int
    params_C: Tree
    parts: tuple[tuple[Tensor, Tensor, Tensor, Tensor], ...]


@final
@dataclass(frozen=True, slots=True)
class FeatureUpload:
    """Features, opinion and labels of a client's own rows, as a client work; one client a job.

    Args:
        model: The client's own, with its private parameters where it has some.
        most: Rows of one client at most.
    """

    model: Featuring
    _: KW_ONLY
    most: int = 1 << 20

    def expected(self, job: Job) -> Expected:
        """As many rows as the client has."""
        classes = int(self.model.classes or 0)
        return Expected(
            group=f"offer/{classes}",
            tensors={
                "features": TensorSpec((ANY, self.model.width), torch.float16),
                "logits": TensorSpec((ANY, classes), torch.float16),
                "labels": TensorSpec((ANY,), torch.int16),
            },
            metrics={"count": replace(COUNT, high=self.most), "failed": FAILED},
            weight=(0.0, self.most),
            numbers=self.most * (self.model.width + classes + 1),
        )

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FeatureUploadState:
        """The client's model, and no row yet.

        Raises:
            LichenError: if several clients are asked at once: they have unequally many rows.
        """
        if len(clients) != 1:
            raise LichenError("clients offer rows one at a time", where="offer", fix="ask for one client a job")
        trainable = job.shared.trainable
        return FeatureUploadState(job=job, client=clients[0], params_C=personal_C(trainable, own_C, 1), parts=())

    def step(self, state: FeatureUploadState, batch: Batch) -> FeatureUploadState:
        """One more batch of rows."""
        with torch.no_grad():
            features_BF = self.model.features(state.params_C, batch)[0].cpu()
            logp_BK = self.model.logits(state.params_C, {}, batch)[0].float().log_softmax(-1).cpu()
        index_B = batch["index_CB"][0].cpu()
        real_B = (index_B >= 0) & batch["active_C"][0].cpu()
        labels_B = batch["labels_CB"][0].cpu()
        part = (index_B[real_B], features_BF[real_B], logp_BK[real_B], labels_B[real_B])
        return replace(state, parts=(*state.parts, part))

    def final(self, state: FeatureUploadState) -> tuple[Message, Tree | None]:
        """``features`` ``(1, N, F)`` and ``logits`` ``(1, N, K)`` float16, ``labels`` ``(1, N)`` int16.

        Rows come in the shard's order. A client without rows, or whose numbers are not finite in two
        bytes, offers none: N = 0, weight 0.

        Raises:
            LichenError: if the client has more than ``most`` rows.
        """
        assert self.model.classes is not None
        if state.parts:
            index_N, features_NF, logp_NK, labels_N = (torch.cat(column) for column in zip(*state.parts, strict=True))
            order_N = index_N.argsort()
            features_NF, logp_NK = features_NF[order_N].half(), logp_NK[order_N].half()
            labels_N = labels_N[order_N].to(torch.int16)
        else:
            features_NF, logp_NK = torch.zeros(0, self.model.width).half(), torch.zeros(0, self.model.classes).half()
            labels_N = torch.zeros(0, dtype=torch.int16)
        if len(labels_N) > self.most:
            raise LichenError(f"{len(labels_N):,} rows are more than {self.most:,}", where="offer", fix="raise most")
        # An opinion of minus infinity is only a probability that two bytes cannot hold.
        finite = bool(features_NF.isfinite().all()) and not bool(logp_NK.isnan().any())
        rows = slice(None) if finite else slice(0)
        least = torch.finfo(torch.float16).min
        tensors = {
            "features": features_NF[rows][None],
            "logits": logp_NK[rows].clamp(min=least)[None],
            "labels": labels_N[rows][None],
        }
        count_C = torch.tensor([float(len(labels_N[rows]))], dtype=torch.float64)
        message = Message(
            group=f"offer/{self.model.classes}",
            client_C=torch.tensor([state.client], dtype=torch.int64),
            version_C=torch.tensor([state.job.version], dtype=torch.int64),
            tensors=tensors,
            weight_C=count_C,
            metrics={"count": count_C, "failed": torch.tensor([float(not finite)], dtype=torch.float64)},
        )
        return message, None
