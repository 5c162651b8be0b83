"""Fits adapters to each client's memory: rank and number of trained blocks.

A client needs the frozen base, the shared tensors, and what one step makes besides: activations, gradients,
moments. The last is counted (:mod:`lichen.recipes.assemble.live_bytes`) on the run's own client work with the largest
of its batches, for the smallest adapter there is (rank 1 on the last block), for the recipe's rank on the last block,
and for the whole adapter. At every moment of a step, what is alive grows with the rank and with the blocks in
a straight line; the most there ever is is the largest of such lines, and lies on or below the chord that is
drawn between the measured ends.

Clients first get directions, then blocks: more memory never means less of either. What is counted are tensors;
the interpreter and its libraries, some hundreds of MiB, come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, final

import torch

from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.conventions.factor_pairs import layers_with_factors, rank_axis
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job
from lichen.core.tree import block_of
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.models.adapters.quantized import resident_bytes
from lichen.models.cohort import Cohort
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.live_bytes import LiveBytes
from lichen.recipes.assemble.workload import largest_batch
from lichen.server.lowrank.submodel import Capacity

__all__ = ["DeviceTier", "Needs", "TierSettings", "capacity_of", "device_tiers", "fit_to_memory", "needs_of"]

GIB = 1 << 30


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """What a client trains.

    Attributes:
        rank: Directions of its adapter.
        last: Its blocks, counted from the last; None: all.
    """

    rank: int
    last: int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes of tensors that one client holds at most, by what it trains.

    Attributes:
        rank: The recipe's rank.
        blocks: Blocks with an adapter.
        least: Needed for rank 1 on the last block.
        narrow: For the whole rank on the last block.
        whole: For everything.
    """

    rank: int
    blocks: int
    least: int
    narrow: int
    whole: int

    def tiers(self) -> tuple[tuple[TierSettings, int], ...]:
        """What can be trained, from the least to all, with the bytes it needs; these never fall.

        >>> for step, bytes in Needs(rank=2, blocks=3, least=10, narrow=12, whole=30).tiers():
        ...     print(step.rank, step.last, bytes)
        1 1 10
        2 1 12
        2 2 21
        2 None 30
        """
        narrow, whole = max(self.least, self.narrow), max(self.least, self.narrow, self.whole)
        ranks = [
            (TierSettings(rank=r, last=1), self.least + _share(narrow - self.least, r - 1, self.rank - 1))
            for r in range(1, self.rank + 1)
        ]
        blocks = [
            (TierSettings(rank=self.rank, last=n), narrow + _share(whole - narrow, n - 1, self.blocks - 1))
            for n in range(2, self.blocks)
        ]
        return (*ranks, *blocks, (TierSettings(rank=self.rank, last=None), whole))

    def fit_to_memory(self, memory: float) -> TierSettings:
        """The most that fits; more memory never gives less.

        Args:
            memory: Bytes for tensors.

        Raises:
            LichenError: if not even rank 1 on the last block does.
        """
        able = [step for step, needed in self.tiers() if needed <= memory]
        if not able:
            raise LichenError(
                f"{memory / GIB:.3g} GiB hold no client: the base, and rank 1 on the last block, "
                f"need {self.least / GIB:.3g} GiB",
                where="federation.memory",
                fix=f"give at least {math.ceil(100 * self.least / GIB) / 100:g}, or set model.quantize to nf4, "
                "model.dtype to bfloat16, or engine.gradient_checkpointing to true",
            )
        return able[-1]


def _share(whole: int, part: int, parts: int) -> int:
    return math.ceil(whole * part / parts) if parts else 0


def needs_of(experiment: Experiment, client_task: ClientTask) -> Needs:
    """Count three steps of one client.

    Args:
        experiment: Of a recipe with a LoRA adapter on a foundation model.
        client_task: What its clients do in a round, and the batches they do it with.

    Raises:
        LichenError: if what is trained has no ranks and no blocks to choose from.
    """
    cohort = innermost(experiment.model)
    wrapped: Any = cohort.wrapped if isinstance(cohort, Cohort) else None
    spec = None if wrapped is None else wrapped.spec
    blocks = {
        block for layer in layers_with_factors(experiment.start.trainable) if (block := block_of(layer)) is not None
    }
    if spec is None or not spec.kind.facts.low_rank or not blocks:
        raise LichenError(
            "only a LoRA adapter in the blocks of a foundation model can be cut to a client's memory",
            where="federation.memory",
            fix="set model.adapter.kind to lora, or leave the key out",
        )
    client, batch = largest_batch(client_task, len(experiment.clients.train))
    # An adapter that does nothing yet would leave no patch behind; later ones do.
    nonzero = {n: torch.full_like(x, 1e-3) for n, x in experiment.start.trainable.items() if rank_axis(n) == 1}
    start = experiment.start | Shared(nonzero)
    base = resident_bytes(wrapped.model)

    def needed(rank: int, last: int | None) -> int:
        submodel = Capacity((rank,), last_N=(last,), scaling=spec.scale)
        return base + _step_bytes(
            client_task,
            submodel.extract(start, submodel.key(0)),
            client,
            batch,
            experiment.model.base,
            times=experiment.recipe.federation.gradient_accumulation_steps,
        )

    return Needs(
        rank=spec.rank,
        blocks=len(blocks),
        least=needed(1, 1),
        narrow=needed(spec.rank, 1),
        whole=needed(spec.rank, None),
    )


def _step_bytes(
    client_task: ClientTask, shared: Shared, client: int, batch: Batch, base: str, *, times: int = 1
) -> int:
    """The shared tensors, and the most that one client's fold over one batch, or so many like it, makes besides."""
    settings = {"lr_scale": 1.0}
    job = Job(work="train", shared=shared, version=0, clients=(client,), seed=0, base=base, settings=settings)
    with LiveBytes() as live_bytes:
        fold(client_task.work, repeat(batch, times), job, (client,))
    peak: int = live_bytes.peak
    return shared.nbytes + peak


def fit_to_memory(experiment: Experiment, client_task: ClientTask, memory: float) -> TierSettings:
    """The most that a client with so many bytes for tensors can train; see :func:`needs_of`."""
    return needs_of(experiment, client_task).fit_to_memory(memory)


def _memory(experiment: Experiment) -> Sequence[float]:
    return experiment.recipe.federation.memory or ()


def capacity_of(experiment: Experiment, client_task: ClientTask) -> Capacity | None:
    """Every client's rank and blocks by ``federation.memory``, dealt out in turns; None where it is not given.

    Raises:
        LichenError: if some client's memory is too little, or there is no adapter to cut.
    """
    memory = _memory(experiment)
    if not memory:
        return None
    needs = needs_of(experiment, client_task)
    fits = [needs.fit_to_memory(gib * GIB) for gib in memory]
    mine = [fits[client % len(fits)] for client in range(len(experiment.clients.train))]
    model: Any = experiment.model
    return Capacity(tuple(f.rank for f in mine), last_N=tuple(f.last for f in mine), scaling=model.wrapped.spec.scale)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTier:
    """A row of the plan: a memory some clients have, and what they train in it.

    Attributes:
        memory: GiB.
        clients: How many have it.
        rank: Their rank.
        layers: Blocks they train.
        of: Blocks there are.
        needed: Bytes that takes, at most.
    """

    memory: float
    clients: int
    rank: int
    layers: int
    of: int
    needed: int


def device_tiers(experiment: Experiment, client_task: ClientTask) -> tuple[DeviceTier, ...]:
    """What clients of each memory train, the smallest first; nothing without ``federation.memory``.

    Raises:
        LichenError: as :func:`capacity_of`.
    """
    memory = _memory(experiment)
    if not memory:
        return ()
    needs, count = needs_of(experiment, client_task), len(experiment.clients.train)
    steps = dict(needs.tiers())
    having = {gib: sum(1 for c in range(count) if memory[c % len(memory)] == gib) for gib in sorted(set(memory))}
    out = []
    for gib, clients in having.items():
        chosen = needs.fit_to_memory(gib * GIB)
        layers = needs.blocks if chosen.last is None else chosen.last
        out.append(
            DeviceTier(
                memory=gib,
                clients=clients,
                rank=chosen.rank,
                layers=layers,
                of=needs.blocks,
                needed=steps[chosen],
            )
        )
    return tuple(out)
