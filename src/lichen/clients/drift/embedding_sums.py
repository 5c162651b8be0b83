"""Sums of random Fourier features of a client's rows, now and then: what a server needs to tell whether they drifted.

A client sends the sum over its rows of now, the sum over all its rows, and how many there are; and the first of these
again for permutations of its own rows, which the p-value is made of (:mod:`lichen.server.drift.mmd`). Everything is a
sum, so that masks can lie over it, and a multiple of ``2^-24``, so that it is exact in any order.

Who knows how a client's rows were permuted could, with as many permutations as rows, solve for each row. So the
permutations of a node that hides its sums come from a ``secret`` of its own. Without one they follow from the job's
seed, which is for simulations and for servers that may see what a client sends.

Noise, N(0, σ²) on each number by each client, is rounded to the same multiples. It makes no claim of privacy here: it
is for masked sums, in which n clients' shares of it add up.

References:
    Arthur Gretton, Karsten M. Borgwardt, Malte J. Rasch, Bernhard Schölkopf and Alexander Smola. "A Kernel Two-Sample
    Test." Journal of Machine Learning Research 13, 2012, 723-773. https://jmlr.org/papers/v13/gretton12a.html
    Ali Rahimi and Benjamin Recht. "Random Features for Large-Scale Kernel Machines." NeurIPS 2007.
    https://papers.nips.cc/paper/2007/hash/013a006f03dbc5392effeb8f18fda755-Abstract.html

Legend: C clients, B rows of a batch, N rows of a client, P permutations, Q = P + 1, d numbers of a row, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.data.batches.two_periods import NOW
from lichen.server.drift.fourier import BITS, RandomFourier, random_fourier

__all__ = ["BANDWIDTH", "EmbeddingSums", "numbers_of"]

BANDWIDTH = "bandwidth"
"""The job's setting: σ of the kernel."""

PERMUTATIONS = 199
"""By default; p is then 0.005 at the least."""

_CELLS = 1 << 22  # of a table of permutations times rows that is made at once


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingState:
    """A block of clients part way through their rows.

    Attributes:
        job: What was asked.
        clients: Whose rows.
        fourier: φ.
        units_C: φ of each client's rows so far, in parts, int32 ``(·, D)``.
        now_C: Of the same rows, whether each is of the later period.
    """

    job: Job
    clients: tuple[int, ...]
    fourier: RandomFourier
    units_C: tuple[tuple[Tensor, ...], ...]
    now_C: tuple[tuple[Tensor, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class EmbeddingSums:
    """The sums as a client work: tensors ``now`` (Q, D), ``all`` (D,) and ``rows`` (2,), float64.

    Its batches are those of :class:`lichen.data.batches.two_periods.TwoPeriods`. The job's seed also draws φ, and its
    setting ``bandwidth`` is φ's.

    Args:
        features: Frozen features ``(C, B, d)`` of a batch.
        width: d.
        dimension: D.
        permutations: P.
        noise: σ of what each client adds to each number of ``now`` and ``all``.
        secret: Seed of permutations and noise, this node's own; None: they follow from the job's seed.

    Raises:
        LichenError: if a number is out of range.
    """

    features: Callable[[Batch], Tensor]
    _: KW_ONLY
    width: int
    dimension: int = 512
    permutations: int = PERMUTATIONS
    noise: float = 0.0
    secret: int | None = None

    def __post_init__(self) -> None:
        if self.permutations < 1 or self.dimension < 1:
            raise LichenError(
                f"{self.permutations} permutations of {self.dimension} features",
                where="drift.mmd",
                fix="use 1 or more of each",
            )
        if not 0 <= self.noise < 2.0**BITS:
            raise LichenError(f"noise of {self.noise}", where="drift.mmd.noise", fix="use a number from 0 to 2^24")

    def expected(self, job: Job) -> Expected:
        """The three sums."""
        shapes = {"now": (self.permutations + 1, self.dimension), "all": (self.dimension,), "rows": (2,)}
        tensors = {name: TensorSpec(shape, torch.float64) for name, shape in shapes.items()}
        return Expected(group=self._group, tensors=tensors)

    @property
    def _group(self) -> str:
        return f"drift/{self.width}x{self.dimension}/{self.permutations}"

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> EmbeddingState:
        """No rows.

        Raises:
            LichenError: if the job names no bandwidth.
        """
        bandwidth = float(job.settings.get(BANDWIDTH, math.nan))
        fourier = random_fourier(self.width, self.dimension, bandwidth=bandwidth, seed=job.seed)
        nothing: tuple[tuple[Tensor, ...], ...] = ((),) * len(clients)
        return EmbeddingState(job=job, clients=tuple(clients), fourier=fourier, units_C=nothing, now_C=nothing)

    @torch.no_grad()
    def step(self, state: EmbeddingState, batch: Batch) -> EmbeddingState:
        """The state with one more batch's rows; raises as :meth:`lichen.server.drift.fourier.RandomFourier.units`."""
        x_CBd, counted_CB = self.features(batch), counted(batch)
        units_C, now_C = list(state.units_C), list(state.now_C)
        for c, counted_B in enumerate(counted_CB):
            if bool(counted_B.any()):
                units_ND = state.fourier.units(x_CBd[c].detach().cpu()[counted_B]).int()
                units_C[c] = (*units_C[c], units_ND)
                now_C[c] = (*now_C[c], batch[NOW][c].cpu().expand(len(units_ND)))
        return replace(state, units_C=tuple(units_C), now_C=tuple(now_C))

    def final(self, state: EmbeddingState) -> tuple[Message, Tree | None]:
        """One message of sums, weighed by the rows in them."""
        found = [self._sums(state, c) for c in range(len(state.clients))]
        tensors = {name: torch.stack([one[name] for one in found]) for name in found[0]}
        message = Message(
            group=self._group,
            client_C=torch.tensor(state.clients, dtype=torch.int64),
            version_C=torch.full((len(state.clients),), state.job.version, dtype=torch.int64),
            tensors=tensors,
            weight_C=tensors["rows"].sum(1),
        )
        return message, None

    def _sums(self, state: EmbeddingState, c: int) -> Tree:
        """One client's."""
        units_ND = torch.cat([torch.zeros(0, self.dimension), *state.units_C[c]]).double()
        is_now_N = torch.cat([torch.zeros(0, dtype=torch.bool), *state.now_C[c]])
        N, now = len(is_now_N), int(is_now_N.sum())
        g = torch_generator(
            state.job.seed if self.secret is None else self.secret, state.job.seed, state.clients[c], "permutations"
        )
        sums = [(is_now_N.double() @ units_ND).unsqueeze(0)]
        left = self.permutations
        while left:
            some = min(left, max(1, _CELLS // max(N, 1)))
            first_SN = torch.rand(some, N, generator=g, dtype=torch.float64).argsort(stable=True, dim=1)[:, :now]
            picked_SN = torch.zeros(some, N, dtype=torch.float64).scatter_(1, first_SN, 1.0)
            sums.append(picked_SN @ units_ND)
            left -= some
        units = {"now": torch.cat(sums), "all": units_ND.sum(0)}
        if self.noise:
            for name, x in units.items():
                units[name] = (
                    x + (torch.randn(x.shape, generator=g, dtype=torch.float64) * self.noise * 2**BITS).round()
                )
        rows = torch.tensor([N - now, now], dtype=torch.float64)
        return {**{name: x * 2.0**-BITS for name, x in units.items()}, "rows": rows}


def counted(batch: Batch) -> Tensor:
    """Which rows are rows, ``(C, B)``: neither padding nor of a client that has no such batch."""
    index_CB = batch["index_CB"].cpu()
    return (index_CB >= 0) & batch["active_C"].cpu().unsqueeze(1)


def numbers_of(batch: Batch) -> Tensor:
    """The plain numbers of rows that have some, such as pixels: ``(C, B, d)``."""
    return batch["x_CBF"].flatten(2)
