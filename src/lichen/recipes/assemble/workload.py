"""Counts the tokens of a batch, and the equal budgets of the baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import final

import torch

from lichen.clients.training.optimize import lr_factor
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.model import Batch
from lichen.core.conventions.labels import has_label
from lichen.core.errors import LichenError
from lichen.data.batches.shards import pooled
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.sides.clients import declared
from lichen.recipes.assemble.sides.masks import without_masks
from lichen.recipes.assemble.sides.server import ServerSide, participants, rows_per_round
from lichen.recipes.assemble.sides.withdrawal.absent import absent_of
from lichen.recipes.schema.recipe import Recipe

__all__ = [
    "Unbudgeted",
    "Workload",
    "alone_rounds",
    "heaviest",
    "largest_batch",
    "pooled_experiment",
    "refuse_warmup",
    "stop_of",
    "trial_rounds",
    "unbudgeted",
    "warmup_rounds",
    "workload_of",
]


DRAWS = 16
"""Rounds whose batches are looked through for the largest."""

VALIDATED_PASSES = 0.25
"""Passes over a client's rows, on average, after which alone_best validates at the latest, if a round is less."""


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
    tokens, square = length_CB.sum(), length_CB.square().sum()
    if "second_mask_CBT" in batch:
        second_CB = batch["second_mask_CBT"].sum(2) * real_CB
        tokens, square = tokens + second_CB.sum(), square + second_CB.square().sum()
        labelled = labelled + ((batch["second_labels_CBT"][:, :, 1:] != -100) & active_C1[..., None]).sum()
    return Workload(rows=int(real_CB.sum()), tokens=int(tokens), labelled=int(labelled), square=int(square))


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
        "absent": (),
    }
    # Nobody lies where there is one, nobody hides in a sum, and what is its own is the model.
    left_out = {"attack": None, "personal": None}
    alone = experiment.recipe.model_copy(update={"federation": fed.model_copy(update=changes), **left_out})
    recipe = without_masks(alone)
    own = experiment.clients
    everybody = replace(
        own,
        train=(pooled(own.train),),
        valid=(pooled(own.valid),),
        test=(pooled(own.test),),
        canaries=(),
        absent=frozenset(),
    )
    roster = declared(everybody, ("pooled",))
    return replace(experiment.with_server(recipe=recipe, roster=roster), clients=everybody)


def refuse_warmup(server: ServerSide) -> None:
    """Refuse a warm-up that is not over when the shortest column is, before any is trained.

    Raises:
        LichenError: naming the column.
    """
    warmup, longer = warmup_rounds(server.recipe), {"alone": "federation.rounds", "alone_best": "compare.alone_epochs"}
    for name in [column for column in longer if column in server.recipe.compare.baselines]:
        rounds = alone_rounds(server) if name == "alone" else min(n for n in unbudgeted(server).rounds_N if n)
        if warmup >= rounds and warmup:
            raise LichenError(
                f"{warmup} rounds of warm-up do not fit in the {rounds} of the column {name}",
                where="optimizer.warmup",
                fix=f"use fewer than {rounds}, more {longer[name]}, or leave {name} out of compare.baselines",
            )


def alone_rounds(server: ServerSide) -> int:
    """Rounds of training alone: a client's share of the federation's."""
    return max(1, math.ceil(server.recipe.federation.rounds * participants(server) / len(server.roster)))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Unbudgeted:
    """How long clients train alone where the federation's budget does not say: the column alone_best.

    Attributes:
        every: Rounds between validations.
        patience: Validations without a gain after which a client stops.
        rounds_N: Rounds of each client at most, whole validations.
        warmup: Rounds in which the learning rate rises, and nobody stops.
    """

    every: int
    patience: int
    rounds_N: tuple[int, ...]
    warmup: int

    @property
    def rounds(self) -> int:
        """Of the client that may train longest."""
        return max(self.rounds_N)

    def lr_scale(self, round_: int) -> float:
        """Factor on the learning rate: it rises, and then stays, since nobody knows when it would have to fall."""
        return lr_factor("constant", round_, self.rounds, warmup=self.warmup)

    def training(self, round_: int) -> tuple[int, ...]:
        """Clients of this round, from 0, if all go on as long as they may."""
        return tuple(client for client, most in enumerate(self.rounds_N) if round_ < most)


def unbudgeted(server: ServerSide, *, steps: int | None = None) -> Unbudgeted:
    """How long the clients of the column alone_best may train.

    Args:
        server: The server's side.
        steps: Local steps of a round; None: as the recipe says.
    """
    compare, fed, rows_N = server.recipe.compare, server.recipe.federation, server.roster.rows("train")
    batch = fed.batch_size * fed.gradient_accumulation_steps
    if fed.local_epochs is not None and steps is None:
        passes_N = [float(fed.local_epochs)] * len(rows_N)
    else:
        passes_N = [(steps or fed.fixed_steps) * min(batch, rows) / rows if rows else 1.0 for rows in rows_N]
    often = sum(passes_N) / len(passes_N)
    every = max(1, min(fed.valid_every, math.ceil(VALIDATED_PASSES / often)))
    most_N = [max(compare.alone_epochs / passes, alone_rounds(server)) for passes in passes_N]
    absent = absent_of(server.recipe, server.roster.names)
    whole_N = [0 if c in absent else math.ceil(most / every) * every for c, most in enumerate(most_N)]
    return Unbudgeted(
        every=every, patience=compare.alone_patience, rounds_N=tuple(whole_N), warmup=warmup_rounds(server.recipe)
    )


def warmup_rounds(recipe: Recipe) -> int:
    """Rounds in which the learning rate rises."""
    fed, warmup = recipe.federation, recipe.optimizer.warmup
    return warmup // fed.fixed_steps if fed.keep_optimizer else warmup  # a DiLoCo worker's are counted in steps


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


def stop_of(recipe: Recipe) -> Callable[[ServerState], bool]:
    """Whether a column has validated as often without improving as the recipe has patience for."""
    fed = recipe.federation
    patience, every = fed.patience, fed.valid_every

    def stop(state: ServerState) -> bool:
        if patience is None or state.best_round < 1:
            return False
        return state.round // every - state.best_round // every >= patience

    return stop


def largest_batch(client_task: ClientTask, clients: int) -> tuple[int, Batch]:
    """The client with the largest batches, and the largest of some rounds' of them."""
    client = heaviest(client_task.source, range(clients), 1)[0]
    batches = [batch for r in range(DRAWS) for batch in client_task.source.batches((client,), r)]
    if not batches:
        raise LichenError("no client has rows to train on", where="data")

    def size(batch: Batch) -> tuple[int, int]:
        mask = batch.get("attention_mask_CBT")
        return 0 if mask is None else int(mask.sum()), sum(x.numel() for x in batch.values())

    return client, max(batches, key=size)
