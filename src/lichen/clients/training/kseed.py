"""FedKSeed's client: zeroth-order training whose message is seeds and scalars.

K directions are fixed for the run, each drawn from a seed that everybody can derive. A model is then
nothing but its start and one number for each direction::

    θ = θ0 − η Σ_s G_s z(s)

That is all that goes down. A client rebuilds θ, takes τ steps of zeroth order along directions chosen
from the K, and sends back τ pairs of an index and a slope.

Everybody must rebuild the same θ to the last bit. Slopes are therefore rounded to integers, multiples of
``2^-bits``; z is made of integers as well; so ``Σ G_s z(s)`` is an integer below 2^53, and float64 sums of
it are exact in any order, on any number of threads, from scratch or by what changed since the last
version. The learning rate is constant in the paper; here a schedule's factor is in the slope.

References:
    Zhen Qin, Daoyuan Chen, Bingchen Qian, Bolin Ding, Yaliang Li and Shuiguang Deng. "Federated
    Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes."
    ICML 2024. https://arxiv.org/abs/2312.06353

Legend: C clients, K directions, S of them at a time, P numbers of a piece, N of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.clients.training.kseed_replay import SUMS, KSeedReplay
from lichen.clients.training.mezo import add_metrics, both_sides, check_rates, shift
from lichen.clients.training.training_sums import WeighBy, training_expected, training_message
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import numpy_generator
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["INDEX", "UNITS", "FedKSeed", "ReplayedWork"]

INDEX = "kseed.index"
"""``(C, τ)`` in a message: the directions gone along, int16 where K allows, -1 past a client's last step."""
UNITS = "kseed.units"
"""``(C, τ)`` int32 in a message: the slopes, in units of ``2^-bits``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FedKSeedState:
    """A block of clients in the middle of training.

    Attributes:
        job: What was asked.
        clients: Roster indices.
        params_C: Tensors now, this block's alone: steps change them in place.
        fixed: Shared tensors without client axis.
        chosen: The directions each client goes along, in order.
        index_Ct: Those it has gone along; -1 past its last step.
        units_Ct: Its slopes along them.
        sums: ``(C,)`` float64 ``loss_sum``, ``count``, ``tokens``, ``steps``, on the CPU.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    fixed: Tree
    chosen: tuple[tuple[int, ...], ...]
    index_Ct: Tensor
    units_Ct: Tensor
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class FedKSeed:
    """FedKSeed's client work: some zeroth-order steps, sent as pairs of an index and a slope.

    Args:
        model: Runs C clients at once.
        replay: The run's directions, learning rate and start.
        steps: τ, the most steps a client takes in a round; a message's size follows from it.
        eps: ε, how far to either side a step looks.
        clip: The slope's magnitude is cut to this.
        weigh_by: What a client's weight counts, as in :class:`lichen.clients.training.train.Train`.

    Raises:
        LichenError: if a value is out of range.
    """

    model: CohortModel
    replay: KSeedReplay
    _: KW_ONLY
    steps: int
    eps: float = 1e-3
    clip: float = 100.0
    weigh_by: WeighBy = "examples"

    def __post_init__(self) -> None:
        check_rates(self.replay.lr, self.eps, self.clip, self.weigh_by, self.replay.kind)
        if self.steps < 1:
            raise LichenError(f"{self.steps} steps", where="kseed.steps", fix="take one or more")
        if self.clip * 2**self.replay.bits >= 2**31:
            raise LichenError(
                f"a slope of {self.clip} does not fit into 32 bits at {self.replay.bits} after the point",
                where="kseed.clip",
                fix="lower clip or bits",
            )

    def expected(self, job: Job) -> Expected:
        """The pairs, as many for every client."""
        tensors = {INDEX: TensorSpec((self.steps,), self._narrow), UNITS: TensorSpec((self.steps,), torch.int32)}
        return replace(training_expected(self.model, tensors, self.weigh_by), group=self._group)

    @property
    def _narrow(self) -> torch.dtype:
        return torch.int16 if self.replay.count <= 2**15 else torch.int32

    @property
    def _group(self) -> str:
        return f"kseed/{self.replay.count}/{self.replay.bits}/{self.model.group}"

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> FedKSeedState:
        """The sums made tensors, once for the block, and each client's directions drawn.

        Raises:
            LichenError: if the job carries trainable tensors beside the sums, or no sums.
        """
        trainable, fixed = job.shared.trainable, job.shared.fixed
        stray = sorted(trainable.keys() - {SUMS})
        if stray:
            raise LichenError(f"{stray[0]!r} comes beside the seed sums", where="job", fix="share the sums alone")
        initial = self.replay.tree(trainable)
        count, each = len(clients), self.steps
        chosen = tuple(
            tuple(numpy_generator(job.seed, client, "kseed").integers(self.replay.count, size=each).tolist())
            for client in clients
        )
        return FedKSeedState(
            job=job,
            clients=tuple(clients),
            params_C={n: x[None] for n, x in initial.items()} if count == 1 else trees.broadcast(initial, count),
            fixed=fixed,
            chosen=chosen,
            index_Ct=torch.full((count, each), -1, dtype=self._narrow),
            units_Ct=torch.zeros(count, each, dtype=torch.int32),
            sums=dict.fromkeys(("loss_sum", "count", "tokens", "steps"), torch.zeros(count, dtype=torch.float64)),
        )

    def step(self, state: FedKSeedState, batch: Batch) -> FedKSeedState:
        """One step of every active client along the next of its directions, in place.

        Raises:
            LichenError: if a client has more batches than steps.
        """
        active, at_C = batch["active_C"].tolist(), [int(n) for n in state.sums["steps"].tolist()]
        if any(on and t >= self.steps for on, t in zip(active, at_C, strict=True)):
            raise LichenError(f"more than {self.steps} batches came", where="kseed.steps", fix="raise it to that many")
        replay = self.replay
        seeds = [replay.seed(mine[t]) if on else None for mine, t, on in zip(state.chosen, at_C, active, strict=True)]
        sides = both_sides(
            self.model,
            state.params_C,
            {},
            state.fixed,
            batch,
            seeds,
            eps=self.eps,
            kind=replay.kind,
            clip=self.clip,
        )
        index_Ct, units_Ct = state.index_Ct.clone(), state.units_Ct.clone()
        factor = state.job.settings.get("lr_scale", 1.0) * 2.0**replay.bits
        ends = [self.eps] * len(seeds)
        for c, slope in enumerate(sides.slope_C.tolist()):
            if seeds[c] is not None and math.isfinite(slope):
                units = round(max(-(2**31), min(2**31 - 1, slope * factor)))
                index_Ct[c, at_C[c]], units_Ct[c, at_C[c]] = state.chosen[c][at_C[c]], units
                # The client goes on from the rounded slope, as everybody will.
                ends[c] -= replay.lr * replay.slope(units)
        shift(state.params_C, seeds, ends, replay.kind)
        return replace(state, index_Ct=index_Ct, units_Ct=units_Ct, sums=add_metrics(state.sums, batch, sides))

    def final(self, state: FedKSeedState) -> tuple[Message, Tree | None]:
        """The pairs; no private state. A client with a loss that is not finite sends none, weight 0 and ``failed``."""
        finite_C = state.sums["loss_sum"].isfinite()
        tensors = {
            INDEX: torch.where(finite_C[:, None], state.index_Ct, torch.full_like(state.index_Ct, -1)),
            UNITS: torch.where(finite_C[:, None], state.units_Ct, torch.zeros_like(state.units_Ct)),
        }
        message = training_message(self.model, state.job, state.clients, tensors, state.sums, finite_C, self.weigh_by)
        return replace(message, group=self._group), None


@final
@dataclass(frozen=True, slots=True)
class ReplayedWork:
    """A work done on the tensors that a job's seed sums stand for, such as evaluation.

    Args:
        inner: What is done.
        replay: The run's.
    """

    inner: ClientWork
    replay: KSeedReplay

    def expected(self, job: Job) -> Expected:
        """The work's, on tensors of the start's shapes: nothing is replayed."""
        return self.inner.expected(replace(job, shared=_replayed(job.shared, self.replay.start)))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The work's state on the model's tensors; raises as :meth:`KSeedReplay.tree`."""
        shared = _replayed(job.shared, self.replay.tree(job.shared.trainable))
        return self.inner.init(replace(job, shared=shared), clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """The work's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The work's."""
        return self.inner.final(state)


def _replayed(shared: Shared, tensors: Tree) -> Shared:
    """With the model's tensors in place of the sums."""
    rest = {name: x for name, x in shared.trainable.items() if name != SUMS}
    return replace(shared, trainable=rest | tensors)
