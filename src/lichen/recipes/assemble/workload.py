"""Counts the tokens of a batch, and the equal budgets of the baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import final

import torch

from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch
from lichen.core.conventions.labels import has_label
from lichen.core.errors import LichenError
from lichen.data.batches.shards import pooled
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.sides.clients import declared
from lichen.recipes.assemble.sides.server import ServerSide, participants, rows_per_round
from lichen.recipes.schema.recipe import Recipe

__all__ = ["Workload", "alone_rounds", "heaviest", "pooled_experiment", "refuse_warmup", "trial_rounds", "workload_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Rows without their padding.

    Attributes:
        rows: Rows.
        tokens: Their tokens; 0 for rows without.
        labelled: Tokens with a loss on them, or rows with a class.
        square: Sum over rows of squared lengths, for the attention.
    """

    rows: float = 0
    tokens: float = 0
    labelled: float = 0
    square: float = 0

    @property
    def units(self) -> float:
        """What time is proportional to: tokens, or rows where there are none."""
        return self.tokens or self.rows

    def __add__(self, other: Workload) -> Workload:
        return Workload(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def times(self, factor: float) -> Workload:
        """So many of them.

        >>> Workload(rows=2, tokens=10).times(3).units
        30
        """
        return Workload(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


def workload_of(batch: Batch) -> Workload:
    """The load of one batch, all its active clients together."""
    active_C1 = batch["active_C"][:, None]
    real_CB = batch["index_CB"] >= 0
    if "answer_CB" in batch:
        real_CB = real_CB | (batch["answer_CB"] >= 0)
    real_CB = real_CB & active_C1
    length_CB = torch.zeros_like(batch["index_CB"])
    if "attention_mask_CBT" in batch:
        length_CB = batch["attention_mask_CBT"].sum(2) * real_CB
    if "labels_CBT" in batch:
        labelled = ((batch["labels_CBT"][:, :, 1:] != -100) & active_C1[..., None]).sum()
    else:
        labelled = (has_label(batch["labels_CB"]) & real_CB).sum()
    return Workload(
        rows=int(real_CB.sum()),
        tokens=int(length_CB.sum()),
        labelled=int(labelled),
        square=int(length_CB.square().sum()),
    )


def pooled_experiment(experiment: Experiment) -> Experiment:
    """The experiment of the pooled column: one client with everybody's rows, and the steps that keep the budget."""
    fed, pooled_batch = experiment.recipe.federation, experiment.recipe.compare.pooled_batch_size
    batch, accumulate = (fed.batch_size, fed.gradient_accumulation_steps) if pooled_batch is None else (pooled_batch, 1)
    steps = max(1, round(participants(experiment.server) * rows_per_round(experiment.server) / (batch * accumulate)))
    changes = {
        "batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "local_steps": steps,
        "local_epochs": None,
    }
    recipe = experiment.recipe.model_copy(update={"federation": fed.model_copy(update=changes)})
    own = experiment.clients
    everybody = replace(own, train=(pooled(own.train),), valid=(pooled(own.valid),), test=(pooled(own.test),))
    roster = declared(everybody, ("pooled",))
    return replace(experiment.with_server(recipe=recipe, roster=roster), clients=everybody)


def refuse_warmup(server: ServerSide) -> None:
    """Refuse a warm-up that is not over when the shortest column is, before any is trained.

    Raises:
        LichenError: naming the column.
    """
    fed, warmup, rounds = server.recipe.federation, server.recipe.optimizer.warmup, alone_rounds(server)
    if fed.keep_optimizer:
        warmup //= fed.fixed_steps
    if warmup >= rounds and warmup and "alone" in server.recipe.compare.baselines:
        raise LichenError(
            f"{warmup} rounds of warm-up do not fit in the {rounds} of the column alone",
            where="optimizer.warmup",
            fix=f"use fewer than {rounds}, more federation.rounds, or leave alone out of compare.baselines",
        )


def alone_rounds(server: ServerSide) -> int:
    """Rounds of training alone: a client's share of the federation's."""
    return max(1, math.ceil(server.recipe.federation.rounds * participants(server) / len(server.roster)))


def trial_rounds(recipe: Recipe, rounds: int) -> int:
    """Rounds for which every learning rate is tried before the best one goes on; all where there is one rate."""
    return min(recipe.optimizer.grid_rounds or rounds, rounds) if len(recipe.optimizer.lr) > 1 else rounds


def heaviest(source: Source, clients: Sequence[int], count: int) -> tuple[int, ...]:
    """The clients with the largest first batch, of one shape, so that they make a full block; ascending."""
    some = clients[:: max(1, len(clients) // 512)]
    first = {c: next(iter(source.batches((c,), 0)), None) for c in some}
    # By room first, then by tokens: where padding is dropped, all batches are of one size.
    size = {
        c: (0, 0.0) if b is None else (sum(x.numel() for x in b.values()), workload_of(b).units)
        for c, b in first.items()
    }
    order = sorted(some, key=lambda c: size[c], reverse=True)
    alike = [c for c in order if source.shape(c) == source.shape(order[0])]
    return tuple(sorted([*alike, *(c for c in order if c not in set(alike))][:count]))
