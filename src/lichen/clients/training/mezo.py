"""MeZO: zeroth-order fine-tuning with forward passes only, in the memory of inference.

One step looks at the loss on both sides of a random direction z and goes along it::

    g = (L(θ + ε z) − L(θ − ε z)) / 2ε           θ ← θ − η g z

z is never held: it is drawn again from its seed (:mod:`lichen.core.conventions.directions`), piece by
piece and in place. No activation is kept for a way back, no gradient and no optimizer state is made; past the
model as it came, a client holds one copy of what it trains. Each client draws its own directions from the job's
seed, and sends its difference as :class:`lichen.clients.training.train.Train` does, so that every aggregator fits.

The directions here are independent signs (as in SPSA) unless told otherwise; the paper's are normal.

References:
    Sadhika Malladi, Tianyu Gao, Eshaan Nichani, Alex Damian, Jason D. Lee, Danqi Chen and Sanjeev Arora.
    "Fine-Tuning Language Models with Just Forward Passes." NeurIPS 2023. https://arxiv.org/abs/2305.17333
    James C. Spall. "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
    Approximation." IEEE Transactions on Automatic Control 37(3), 1992. https://doi.org/10.1109/9.119632

Legend: C clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.training.training_sums import WeighBy, add_seen, training_expected, training_message
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.conventions.directions import UNIT, Kind, add_direction
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, specs_of
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree

__all__ = ["ZerothOrder", "add_metrics", "both_sides", "check_rates", "shift"]


def shift(params_C: Tree, seeds: Sequence[int | None], factors: Sequence[float], kind: Kind) -> None:
    """``θ_c += factor_c * z(seed_c)`` in place for every client c; none at all where its seed is None."""
    for c, (seed, factor) in enumerate(zip(seeds, factors, strict=True)):
        if seed is not None:
            for name, x_C in params_C.items():
                add_direction(x_C[c], seed, name, factor, kind)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What two looks along a direction tell, ``(C,)`` float64 on the CPU each.

    Attributes:
        slope_C: ``(L(θ + ε z) − L(θ − ε z)) / 2ε`` of the mean losses, cut to the clip; not finite where a loss is not.
        loss_C: Mean of the two summed losses.
        count_C: Labelled rows or tokens in them.
    """

    slope_C: Tensor
    loss_C: Tensor
    count_C: Tensor


@torch.no_grad()
def both_sides(
    model: CohortModel,
    params_C: Tree,
    frozen_C: Tree,
    fixed: Tree,
    batch: Batch,
    seeds: Sequence[int | None],
    *,
    eps: float,
    kind: Kind,
    clip: float | None = None,
) -> Sides:
    """The clients' slopes along their directions; ``params_C`` is left at ``θ − ε z``, for one shift to finish.

    Args:
        model: Runs C clients at once.
        params_C: What moves, changed in place.
        frozen_C: Trainable tensors that stay.
        fixed: Shared tensors without client axis.
        batch: One step of C clients.
        seeds: Each client's direction; None where it takes no step.
        eps: ε > 0.
        kind: The directions' kind.
        clip: The slope's magnitude is cut to this; None: never.
    """
    up, down = [eps] * len(seeds), [-2 * eps] * len(seeds)
    shift(params_C, seeds, up, kind)
    above_C, count_C = model.loss({**params_C, **frozen_C}, fixed, batch)
    shift(params_C, seeds, down, kind)
    below_C, _ = model.loss({**params_C, **frozen_C}, fixed, batch)
    above_C, below_C, count_C = above_C.double().cpu(), below_C.double().cpu(), count_C.double().cpu()
    slope_C = (above_C - below_C) / count_C.clamp(min=1) / (2 * eps)
    if clip is not None:
        slope_C = slope_C.clamp(-clip, clip)
    return Sides(slope_C=slope_C, loss_C=(above_C + below_C) / 2, count_C=count_C)


def add_metrics(sums: Tree, batch: Batch, sides: Sides) -> Tree:
    """``loss_sum``, ``count``, ``tokens`` and ``steps`` with one more batch's active clients in them."""
    seen = {"loss_sum": sides.loss_C, "count": sides.count_C, "steps": batch["active_C"]}
    return add_seen(sums, batch, seen)


def check_rates(lr: float, eps: float, clip: float | None, weigh_by: str, kind: str) -> None:
    """Refuse settings no step can be taken with.

    Raises:
        LichenError: naming the one that is out of range.
    """
    where = "zeroth_order"
    for name, value in (("lr", lr), ("eps", eps), ("clip", 1.0 if clip is None else clip)):
        if not (math.isfinite(value) and value > 0):
            raise LichenError(f"{value} is not positive", where=f"{where}.{name}", fix="use a number > 0")
    if weigh_by not in ("examples", "tokens", "one"):
        raise LichenError(f"cannot weigh by {weigh_by!r}", where=where, fix="use examples, tokens or one")
    if kind not in UNIT:
        raise LichenError(f"unknown noise {kind!r}", where=f"{where}.kind", fix=f"use {' or '.join(UNIT)}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ZerothOrderState:
    """A block of clients in the middle of training.

    Attributes:
        job: What was asked; its trainable tensors are where the clients began.
        clients: Roster indices.
        params_C: Trained tensors now, this block's alone: steps change them in place.
        frozen_C: Trainable tensors that nobody trains here.
        fixed: Shared tensors without client axis.
        sums: ``(C,)`` float64 ``loss_sum``, ``count``, ``tokens``, ``steps``, on the CPU.
    """

    job: Job
    clients: tuple[int, ...]
    params_C: Tree
    frozen_C: Tree
    fixed: Tree
    sums: Tree


@final
@dataclass(frozen=True, slots=True)
class ZerothOrder:
    """MeZO as a client work.

    Args:
        model: Runs C clients at once.
        lr: η; the job's setting ``lr_scale`` scales it.
        eps: ε, how far to either side a step looks.
        clip: The slope's magnitude is cut to this; None: never.
        kind: Directions of ``"signs"`` or ``"bell"`` (nearly normal).
        freeze_schedule: Ends of names that nobody trains or sends, as in
            :class:`lichen.clients.training.train.Train`.
        weigh_by: What a client's weight counts, as in :class:`lichen.clients.training.train.Train`.

    Raises:
        LichenError: if a value is out of range.
    """

    model: CohortModel
    _: KW_ONLY
    lr: float
    eps: float = 1e-3
    clip: float | None = None
    kind: Kind = "signs"
    freeze_schedule: tuple[tuple[str, ...], ...] = ()
    weigh_by: WeighBy = "examples"

    def __post_init__(self) -> None:
        check_rates(self.lr, self.eps, self.clip, self.weigh_by, self.kind)

    def expected(self, job: Job) -> Expected:
        """All trainable tensors but the frozen ones."""
        return training_expected(self.model, specs_of(self._trained(job)), self.weigh_by)

    def _trained(self, job: Job) -> Tree:
        schedule = self.freeze_schedule
        frozen = schedule[job.version % len(schedule)] if schedule else ()
        return {name: x for name, x in job.shared.trainable.items() if not name.endswith(frozen)}

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> ZerothOrderState:
        """Clients side by side at the shared tensors.

        Raises:
            LichenError: if nothing is left to train.
        """
        trainable, fixed = job.shared.trainable, job.shared.fixed
        trained = self._trained(job)
        frozen_params = {name: x for name, x in trainable.items() if name not in trained}
        if not trained:
            raise LichenError(
                "no tensor is left to train", where="zeroth_order.freeze_schedule", fix="freeze fewer names"
            )
        zero_C = torch.zeros(len(clients), dtype=torch.float64)
        return ZerothOrderState(
            job=job,
            clients=tuple(clients),
            params_C=trees.broadcast(trained, len(clients)),
            frozen_C=trees.broadcast(frozen_params, len(clients)),
            fixed=fixed,
            sums=dict.fromkeys(("loss_sum", "count", "tokens", "steps"), zero_C),
        )

    def step(self, state: ZerothOrderState, batch: Batch) -> ZerothOrderState:
        """One step of every active client along a direction of its own, in place."""
        active = batch["active_C"].tolist()
        seeds = [
            derive(state.job.seed, client, "direction", int(step)) if on else None
            for client, step, on in zip(state.clients, state.sums["steps"].tolist(), active, strict=True)
        ]
        sides = both_sides(
            self.model,
            state.params_C,
            state.frozen_C,
            state.fixed,
            batch,
            seeds,
            eps=self.eps,
            kind=self.kind,
            clip=self.clip,
        )
        lr = self.lr * state.job.settings.get("lr_scale", 1.0)
        # One pass ends the look and takes the step. A client without a slope stays where it was; its loss tells.
        ends = [self.eps - lr * g if math.isfinite(g) else self.eps for g in sides.slope_C.tolist()]
        shift(state.params_C, seeds, ends, self.kind)
        return replace(state, sums=add_metrics(state.sums, batch, sides))

    def final(self, state: ZerothOrderState) -> tuple[Message, Tree | None]:
        """The message of ``params - shared``; no private state.

        A client whose loss or parameters are not finite sends weight 0, zeros and ``failed`` = 1.
        """
        finite_C = state.sums["loss_sum"].isfinite()
        for x_C in state.params_C.values():
            finite_C = finite_C & x_C.flatten(1).isfinite().all(1).cpu()
        # In place: the block is done with its parameters, and a second copy might not fit.
        for name, x_C in state.params_C.items():
            x_C.sub_(state.job.shared.trainable[name])
            for c in (~finite_C).nonzero().flatten().tolist():
                x_C[c].zero_()
        return training_message(
            self.model, state.job, state.clients, state.params_C, state.sums, finite_C, self.weigh_by
        ), None
