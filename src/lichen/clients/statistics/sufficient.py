"""Sufficient statistics of a ridge classifier over frozen features: one message trains the head.

A client sends ``G = XᵀX`` (d, d), ``H = XᵀY`` (d, K, one-hot labels) and its class counts; their sums
over any clients are those of the pooled rows, so the server's solution
(:class:`lichen.server.ridge.Ridge`) does not depend on who holds which row.

To make that an identity of bytes and not of real numbers, features are first rounded to multiples of
``2^-bits``. Products are then multiples of ``2^-2bits``, and float64 sums of them are exact in any
order while they stay below 2^53 units; more is refused.

References:
    Eros Fanì, Raffaello Camoriano, Barbara Caputo and Marco Ciccone. "Accelerating Heterogeneous
    Federated Learning with Closed-form Classifiers." ICML 2024. https://arxiv.org/abs/2406.01116 (FED3R)
    Run He, Kai Tong, Di Fang, Han Sun, Ziqian Zeng, Haoran Li, Tianyi Chen and Huiping Zhuang. "AFL: A
    Single-Round Analytic Approach for Federated Learning with Pre-trained Models." CVPR 2025.
    https://arxiv.org/abs/2405.16240

Legend: C clients, B rows, d features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import COUNT, Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["Statistics"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsState:
    """A block of clients part way through their rows."""

    job: Job
    clients: tuple[int, ...]
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class Statistics:
    """Ridge statistics as a client work: tensors ``G``, ``H``, ``n``.

    Args:
        features: Frozen features ``(C, B, d)`` of a batch.
        classes: K.
        width: d without the bias.
        bits: Features are rounded to multiples of ``2^-bits``; the server must use the same.
        bias: Append a feature that is always 1, as the last one.

    Raises:
        LichenError: if a number is out of range.
    """

    features: Callable[[Batch], Tensor]
    _: KW_ONLY
    classes: int
    width: int
    bits: int = 18
    bias: bool = True

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise LichenError(f"{self.classes} classes are too few", where="statistics.classes", fix="use 2 or more")
        if not 4 <= self.bits <= 24:
            raise LichenError(f"{self.bits} is out of range", where="statistics.bits", fix="use 4 to 24")

    def expected(self, job: Job) -> Expected:
        """The three sums."""
        tensors = {name: TensorSpec(shape, torch.float64) for name, shape in self._shapes.items()}
        return Expected(group=self._group, tensors=tensors, metrics={"count": COUNT})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> StatisticsState:
        """Empty sums."""
        zeros = {n: torch.zeros(len(clients), *shape, dtype=torch.float64) for n, shape in self._shapes.items()}
        return StatisticsState(job=job, clients=tuple(clients), sums=zeros)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        wide = self.width + self.bias
        return {"G": (wide, wide), "H": (wide, self.classes), "n": (self.classes,)}

    @property
    def _group(self) -> str:
        return f"statistics/{self.width + self.bias}x{self.classes}/{self.bits}" + ("/bias" if self.bias else "")

    def step(self, state: StatisticsState, batch: Batch) -> StatisticsState:
        """The sums with one more batch's labelled rows in them.

        Raises:
            LichenError: if a feature is not finite, there are not ``width`` of them, a label is no class, or the sums
                leave the exact range.
        """
        labels_CB = batch["labels_CB"].cpu()
        counted_CB = (labels_CB >= 0) & batch["active_C"].cpu().unsqueeze(1)
        if "index_CB" in batch:
            counted_CB = counted_CB & (batch["index_CB"].cpu() >= 0)
        if bool((labels_CB >= self.classes).any()):
            raise LichenError(
                f"label {int(labels_CB.max())} is not one of {self.classes} classes",
                where="statistics.classes",
                fix="count the classes of the whole federation",
            )
        with torch.no_grad():
            x_CBd = self.features(batch).detach().cpu().double()
        if x_CBd.shape[-1] != self.width:
            raise LichenError(
                f"rows have {x_CBd.shape[-1]} features, not {self.width}",
                where="statistics.width",
                fix="give the width of the features",
            )
        if self.bias:
            x_CBd = functional.pad(x_CBd, (0, 1), value=1.0)
        x_CBd = torch.where(counted_CB.unsqueeze(-1), x_CBd, torch.zeros_like(x_CBd))
        if not bool(x_CBd.isfinite().all()):
            raise LichenError("a feature is not finite", where="statistics", fix="check the model and the rows")
        unit = 2.0**-self.bits
        x_CBd = (x_CBd / unit).round() * unit
        y_CBK = functional.one_hot(labels_CB.clamp(min=0), self.classes).double() * counted_CB.unsqueeze(-1)
        sums = {
            "G": state.sums["G"] + torch.einsum("cbi,cbj->cij", x_CBd, x_CBd),
            "H": state.sums["H"] + torch.einsum("cbi,cbk->cik", x_CBd, y_CBK),
            "n": state.sums["n"] + y_CBK.sum(1),
        }
        # Every partial sum is bounded by the diagonal (Cauchy-Schwarz), and rounding is monotone: a
        # diagonal that ever left the range is still seen outside it.
        if bool((sums["G"].diagonal(dim1=1, dim2=2) >= 2.0 ** (53 - 2 * self.bits)).any()):
            raise LichenError(
                f"the squares of a feature sum to more than 2^{53 - 2 * self.bits}, past which sums are not exact",
                where="statistics.bits",
                fix=f"scale the features to unit length, or use fewer bits than {self.bits}",
            )
        return replace(state, sums=sums)

    def final(self, state: StatisticsState) -> tuple[Message, Tree | None]:
        """One message of sums, weighed by the rows in them."""
        rows_C = state.sums["n"].sum(1)
        message = Message(
            group=self._group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors=state.sums,
            weight_C=rows_C,
            metrics={"count": rows_C},
        )
        return message, None
