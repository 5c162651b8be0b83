"""How far a client's rows lie apart, counted in bins: the server learns the median distance of rows, and no distance.

A Gaussian kernel sees differences at the scale of its bandwidth, for which the median distance between rows is the
usual choice. Each client counts the distances between some of its own rows in bins that everybody shares; the bins of
all clients add up, and the middle of the median's bin is within 4.5 % of the median.

References:
    Arthur Gretton, Karsten M. Borgwardt, Malte J. Rasch, Bernhard Schölkopf and Alexander Smola. "A Kernel Two-Sample
    Test." Journal of Machine Learning Research 13, 2012, 723-773. https://jmlr.org/papers/v13/gretton12a.html
    (section 8: the median heuristic)

Legend: C clients, B rows of a batch, N rows of a client, m of them that are measured, d numbers of a row, K bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.drift.embedding_sums import counted
from lichen.core.contracts.model import Batch
from lichen.core.conventions.bins import Bins
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree

__all__ = ["DistanceBins", "median_distance"]

DISTANCES = Bins(low=2.0**-20, high=2.0**20, count=320, ratio=True)
"""Eight bins an octave."""

_GROUP = "drift/distances"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistanceState:
    """A block of clients part way through their rows; ``rows_C`` are features so far, in parts ``(·, d)``."""

    job: Job
    clients: tuple[int, ...]
    rows_C: tuple[tuple[Tensor, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class DistanceBins:
    """The counts as a client work: tensor ``bins`` (K,), float64.

    Args:
        features: Frozen features ``(C, B, d)`` of a batch.
        most: Rows of a client that are measured, drawn from all of its rows.
    """

    features: Callable[[Batch], Tensor]
    _: KW_ONLY
    most: int = 64

    def expected(self, job: Job) -> Expected:
        """The counts."""
        return Expected(group=_GROUP, tensors={"bins": TensorSpec((DISTANCES.count,), torch.float64)})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> DistanceState:
        """No rows."""
        return DistanceState(job=job, clients=tuple(clients), rows_C=((),) * len(clients))

    @torch.no_grad()
    def step(self, state: DistanceState, batch: Batch) -> DistanceState:
        """The state with one more batch's rows."""
        x_CBd, counted_CB = self.features(batch).detach().cpu(), counted(batch)
        more = [x_Bd[counted_B] for x_Bd, counted_B in zip(x_CBd, counted_CB, strict=True)]
        return replace(state, rows_C=tuple((*rows, x) for rows, x in zip(state.rows_C, more, strict=True)))

    def final(self, state: DistanceState) -> tuple[Message, Tree | None]:
        """One message of counts, weighed by the rows there were; rows of equal features have no distance.

        Raises:
            LichenError: if a feature is not finite.
        """
        bins_CK = torch.stack([self._bins(state, c) for c in range(len(state.clients))])
        message = Message(
            group=_GROUP,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors={"bins": bins_CK},
            weight_C=torch.tensor([sum(map(len, rows)) for rows in state.rows_C], dtype=torch.float64),
        )
        return message, None

    def _bins(self, state: DistanceState, c: int) -> Tensor:
        bins_K = torch.zeros(DISTANCES.count, dtype=torch.float64)
        if not state.rows_C[c]:
            return bins_K
        x_Nd = torch.cat(state.rows_C[c]).double()
        if not bool(x_Nd.isfinite().all()):
            raise LichenError("a feature is not finite", where="drift.mmd", fix="check the model and the rows")
        g = torch_generator(state.job.seed, state.clients[c], "rows to measure")
        x_md = x_Nd[torch.randperm(len(x_Nd), generator=g)[: self.most]]
        for i, x_d in enumerate(x_md):
            for distance in (x_md[i + 1 :] - x_d).square().sum(1).sqrt().tolist():
                if distance > 0:
                    bins_K[DISTANCES.place(distance)] += 1
        return bins_K


def median_distance(bins_K: Tensor) -> float:
    """The median of all distances that were counted, as the middle of its bin.

    Args:
        bins_K: Over all clients.

    Raises:
        LichenError: if there is none.

    >>> bins_K = torch.zeros(DISTANCES.count)
    >>> bins_K[DISTANCES.place(0.5)], bins_K[DISTANCES.place(3.0)] = 2, 3
    >>> 2.9 < median_distance(bins_K) < 3.15
    True
    """
    upto_K = bins_K.double().cumsum(0)
    if not bool(upto_K[-1] > 0):
        raise LichenError(
            "no client has two rows that differ", where="drift.mmd", fix="give the bandwidth, or clients more rows"
        )
    return DISTANCES.middle(int((upto_K >= upto_K[-1] / 2).nonzero()[0]))
