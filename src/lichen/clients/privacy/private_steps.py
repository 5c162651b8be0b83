"""DP-SGD: steps that hide every row of a client, for any model with a client axis.

A step's batch is a Poisson sample of the client's rows. Each row's gradient is cut to norm C over all trained tensors
together; they are added up, normal noise of deviation sigma C is added once, and the sum is divided by q n, the
number of rows that a batch has on average: a fixed number, for the true one would tell who was in. What the client's
chain of gradient steps and its optimizer make of that is post-processing. So are the client's tensors, and the word
that they are not finite. Of the rest of a training message nothing leaves: loss, tokens and labels seen are zero, and
every client weighs one.

What is released over T steps is a sampled normal mechanism of rate q and noise multiplier sigma, T times
(:mod:`lichen.transforms.privacy`): it holds for adding or removing one row, and n is taken to be public.

References:
    Martín Abadi, Andy Chu, Ian Goodfellow, H. Brendan McMahan, Ilya Mironov, Kunal Talwar and Li Zhang.
    "Deep Learning with Differential Privacy." CCS 2016. https://arxiv.org/abs/1607.00133
    Natalia Ponomareva, Hussein Hazimeh, Alex Kurakin, Zheng Xu, Carson Denison, H. Brendan McMahan, Sergei
    Vassilvitskii, Steve Chien and Abhradeep Thakurta. "How to DP-fy ML: A Practical Guide to Machine Learning with
    Differential Privacy." JAIR 77, 2023. https://arxiv.org/abs/2303.00654 (the fixed divisor, empty batches)

Legend: C clients, N clients of the roster, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch

from lichen.clients.privacy.row_gradients import clipped_sum_C, grid_of, row_gradients
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected
from lichen.core.message import Job, Message
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.tree import Tree

__all__ = ["PrivateSteps"]

HIDDEN = ("loss_sum", "count", "tokens")
"""What a message of training says of the rows seen, and a private one does not."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateState:
    """A block of clients in the middle of private training.

    Attributes:
        train: Parameters, optimizer and private state, as in training without privacy.
        sum_C: Clipped gradients of the step that has not ended, float64 ``(C, ...)``.
        step_C: Steps that each client has ended.
    """

    train: TrainState
    sum_C: Tree
    step_C: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class PrivateSteps:
    """Local training by DP-SGD as a client work; its batches are :class:`lichen.data.batches.poisson_rows.PoissonRows`.

    Args:
        inner: How the client steps with the noised gradient; all clients weigh alike.
        clip: C, the norm at most of a row's gradient.
        sigma: Deviation of the noise on the sum, in units of C; 0 for none, and then no privacy.
        mean_rows_N: q n of every client of the roster: what the noised sum is divided by.
        randomness: Where the noise comes from; None: nowhere, and no step is taken.
        rows_at_once: Rows of all clients side by side, which takes memory and, where steps are exact, changes no bit;
            None: all of a micro-batch.

    Raises:
        LichenError: if a number is out of range, or the client's weight would tell of its rows.
    """

    inner: Train
    _: KW_ONLY
    clip: float
    sigma: float
    mean_rows_N: Sequence[float]
    randomness: SecretRandomness | None
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise LichenError(f"{self.clip} is no bound", where="privacy.clip", fix="use a finite number > 0")
        if not 0 <= self.sigma < math.inf:
            raise LichenError(f"noise of {self.sigma}", where="privacy.sigma", fix="use a finite number >= 0")
        if self.rows_at_once is not None and self.rows_at_once < 1:
            raise LichenError(f"{self.rows_at_once} rows at once", where="PrivateSteps", fix="use 1 or more")
        if self.inner.weigh_by != "one":
            raise LichenError(
                f"a weight by {self.inner.weigh_by} tells how many rows were sampled",
                where="PrivateSteps",
                fix="weigh all clients alike, or by the rows that they declare",
            )
        if self.inner.accumulate > 1:
            raise LichenError("a sample is not cut into equal parts", where="train.accumulate", fix="use 1")

    def expected(self, job: Job) -> Expected:
        """That of training, but that nothing is said of the rows seen."""
        plain = self.inner.expected(job)
        hidden = {name: replace(plain.metrics[name], low=0.0, high=0.0) for name in HIDDEN}
        return replace(plain, metrics={**plain.metrics, **hidden})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> PrivateState:
        """Clients side by side where training begins, and nothing added up yet; raises as training does."""
        train = self.inner.init(job, clients, own_C)
        return PrivateState(train=train, sum_C=_nothing(train.params_C), step_C=(0,) * len(clients))

    def step(self, state: PrivateState, batch: Batch) -> PrivateState:
        """The rows of one micro-batch are added up; clients whose step ends with it take it.

        Raises:
            LichenError: if the batch does not say whose step ends.
        """
        if "ends_step_C" not in batch:
            raise LichenError("the batch is no part of a Poisson sample", where="batch", fix="train from PoissonRows")
        if self.randomness is None:
            raise LichenError("no key is at hand, and nobody trains without noise", where="privacy.unit")
        train, sum_C, exact = state.train, state.sum_C, self.inner.model.reference
        rows = {name: x for name, x in batch.items() if name != "ends_step_C"}
        for client_R, grads_R in row_gradients(
            self.inner.model, train.params_C, train.frozen_C, train.fixed, rows, at_once=self.rows_at_once
        ):
            sum_C = clipped_sum_C(sum_C, client_R, grads_R, self.clip, exact=exact)
        ends_C = batch["ends_step_C"] & batch["active_C"]
        if not bool(ends_C.any()):
            return replace(state, sum_C=sum_C)
        device = next(iter(train.params_C.values())).device
        noised_C = self._noised(self.randomness, train, sum_C, state.step_C, ends_C.tolist())
        nothing_C = torch.zeros(len(train.clients), dtype=torch.float64, device=device)
        train = self.inner.stepped(train, {"active_C": ends_C}, noised_C, nothing_C, nothing_C)
        return PrivateState(
            train=train,
            sum_C={name: torch.where(_wide(ends_C.to(device), x), 0.0, x) for name, x in sum_C.items()},
            step_C=tuple(n + ended for n, ended in zip(state.step_C, ends_C.tolist(), strict=True)),
        )

    def _noised(
        self, secret: SecretRandomness, train: TrainState, sum_C: Tree, step_C: Sequence[int], ends_C: Sequence[bool]
    ) -> Tree:
        """The sums of clients whose step ends, noised and divided, as gradients; zeros of the others."""
        job, grads_C = train.job, trees.zeros_like(train.params_C)
        for c, client in enumerate(train.clients):
            if not ends_C[c]:
                continue
            # Another sum has unrelated noise: what is repeated with other rows has no difference without any.
            labels = (
                job.work,
                job.seed,
                job.version,
                client,
                step_C[c],
                trees.digest({n: x[c] for n, x in sum_C.items()}),
            )
            noise = secret.stream("row noise", *labels)
            divisor = float(self.mean_rows_N[client])
            for name in sorted(sum_C):
                total = sum_C[name][c]
                if self.sigma:
                    noise_x = noise.normal(total.shape, self.sigma * self.clip, grid=grid_of(self.clip))
                    total = total + noise_x.to(total.device)
                grads_C[name][c] = (total / divisor).to(grads_C[name].dtype)
        return grads_C

    def final(self, state: PrivateState) -> tuple[Message, Tree | None]:
        """Training's message, and its private state; see :meth:`lichen.clients.training.train.Train.final`."""
        return self.inner.final(state.train)


def _nothing(params_C: Tree) -> Tree:
    return trees.map_tree(lambda x: torch.zeros_like(x, dtype=torch.float64), params_C)


def _wide(mask_C: torch.Tensor, like_C: torch.Tensor) -> torch.Tensor:
    return mask_C.view(-1, *[1] * (like_C.dim() - 1))
