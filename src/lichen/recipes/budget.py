"""What each column of a recipe will train and evaluate, counted before anything is run.

Invitations and batches follow from the seed, so that the very rows of a run can be counted from its shards: who
is invited to which round, how many tokens that client's batches hold, how often everybody validates. A budget of
very many rounds is counted on some of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, final

import torch

from lichen.core.contracts import Batch, Source
from lichen.core.seeds import derive
from lichen.data.shards import pooled
from lichen.recipes.bench import Bench, grid_name, participants, rows_of
from lichen.recipes.parts import sampler_of, stations, validators_of
from lichen.recipes.prepare import first_of
from lichen.recipes.rules import home_of

__all__ = [
    "Chunk",
    "Kind",
    "Load",
    "alone_rounds",
    "budget",
    "evaluated",
    "invitations",
    "load_of",
    "marks",
    "pooled_bench",
]

Kind = Literal["train", "score", "alone", "alone.keep", "alone.score", "pooled", "pooled.keep", "pooled.score"]
"""Works that take their own time: federated training, scoring shared tensors, and private ones."""

COUNTED = 2000
"""Trainings of one client that are counted one by one; more are counted on so many of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
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

    def __add__(self, other: Load) -> Load:
        return Load(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def times(self, factor: float) -> Load:
        """So many of them.

        >>> Load(rows=2, tokens=10).times(3).units
        30
        """
        return Load(**{f.name: getattr(self, f.name) * factor for f in fields(self)})


def load_of(batch: Batch) -> Load:
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
        labelled = ((batch["labels_CB"] >= 0) & real_CB).sum()
    return Load(
        rows=int(real_CB.sum()),
        tokens=int(length_CB.sum()),
        labelled=int(labelled),
        square=int(length_CB.square().sum()),
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """All work of one kind in one column.

    Attributes:
        kind: Which work.
        load: What it sees, all rounds and learning rates together.
        clients: How often a client is asked.
    """

    kind: Kind
    load: Load
    clients: float


def _round_seeds(bench: Bench, rounds: int) -> list[int]:
    """The seeds of a column's rounds, as the run derives them."""
    run = derive(bench.recipe.seed, "run")
    return [derive(run, "round", r) for r in range(rounds)]


def marks(bench: Bench, rounds: int) -> tuple[list[int], list[int]]:
    """How often each round is trained, and validated, over the whole grid; round 1 comes first.

    With several learning rates all are tried for ``grid_rounds``, validating the last of them; the best
    one goes on.
    """
    recipe = bench.recipe
    rates, every = len(recipe.optimizer.lr), recipe.federation.valid_every
    trial = min(recipe.optimizer.grid_rounds or rounds, rounds) if rates > 1 else rounds
    trained = [rates if r <= trial else 1 for r in range(1, rounds + 1)]
    seen = [t * (r % every == 0 or r in (trial, rounds)) for r, t in enumerate(trained, start=1)]
    return trained, seen


def pooled_bench(bench: Bench) -> Bench:
    """The bench of the pooled column: one client with everybody's rows, and the steps that keep the budget."""
    fed, wanted = bench.recipe.federation, bench.recipe.compare.pooled_batch
    batch, accumulate = (fed.batch, fed.accumulate) if wanted is None else (wanted, 1)
    steps = max(1, round(participants(bench) * rows_of(bench) / (batch * accumulate)))
    changes = {"batch": batch, "accumulate": accumulate, "steps": steps, "epochs": None}
    recipe = bench.recipe.model_copy(update={"federation": fed.model_copy(update=changes)})
    train, valid, test = pooled(bench.train), pooled(bench.valid), pooled(bench.test)
    return replace(bench, recipe=recipe, train=(train,), valid=(valid,), test=(test,))


def alone_rounds(bench: Bench) -> int:
    """Rounds of training alone: a client's share of the federation's."""
    return max(1, math.ceil(bench.recipe.federation.rounds * participants(bench) / len(bench.train)))


def evaluated(source: Source, clients: Sequence[int], seed: int = 0) -> Load:
    """What these clients' batches hold."""
    return sum((load_of(batch) for c in clients for batch in source.batches((c,), seed)), Load())


def _trained(source: Source, rounds: Sequence[tuple[Sequence[int], int, int]]) -> Load:
    """Rounds of (clients, seed, times), counted on every n-th training where they are very many."""
    every = max(1, math.ceil(sum(len(clients) for clients, _, _ in rounds) / COUNTED))
    jobs: Iterator[tuple[int, int, int]] = ((c, seed, times) for clients, seed, times in rounds for c in clients)
    total, weight, all_weight = Load(), 0, 0
    for i, (client, seed, times) in enumerate(jobs):
        all_weight += times
        if i % every == 0:
            total, weight = total + evaluated(source, (client,), seed).times(times), weight + times
    return total.times(all_weight / weight) if weight != all_weight else total


def budget(bench: Bench, invited: Sequence[Sequence[int]]) -> dict[str, tuple[Chunk, ...]]:
    """The work of every column that is compared, and of the federated one.

    Args:
        bench: The recipe's.
        invited: The clients of every round, see :func:`invitations`.
    """
    recipe, everyone = bench.recipe, range(len(bench.train))
    source = stations(bench)[f"train {grid_name(recipe.optimizer.lr[0])}"].source
    valid = evaluated(bench.evaluating(bench.valid), everyone)
    test = evaluated(bench.evaluating(bench.test), everyone)
    # A test set that clients share is scored once for all of them where they score one model.
    shared = sorted(set(first_of(bench.test)))
    own = bool(home_of(recipe))
    once = test if own else evaluated(bench.evaluating(bench.test), shared)
    asked = len(bench.train) if own else len(shared)
    judges = validators_of(bench)
    columns: dict[str, tuple[Chunk, ...]] = {}
    if "base" in recipe.compare.columns and recipe.task == "chat":
        columns["base"] = (Chunk(kind="score", load=once, clients=asked),)
    seeds = _round_seeds(bench, recipe.federation.rounds)
    trained, seen = marks(bench, recipe.federation.rounds)
    columns["federated"] = (
        Chunk(
            kind="train",
            load=_trained(source, list(zip(invited, seeds, trained, strict=True))),
            clients=sum(len(who) * t for who, t in zip(invited, trained, strict=True)),
        ),
        Chunk(
            kind="score",
            load=evaluated(bench.evaluating(bench.valid), judges).times(sum(seen)) + once,
            clients=len(judges) * sum(seen) + asked,
        ),
    )
    if "alone" in recipe.compare.columns:
        columns["alone"] = _private(bench, "alone", alone_rounds(bench), valid, test)
    if "pooled" in recipe.compare.columns:
        together = pooled_bench(bench)
        parts = [evaluated(together.evaluating(part), (0,)) for part in (together.valid, together.test)]
        mine = _private(together, "pooled", recipe.federation.rounds, *parts)
        columns["pooled"] = (*mine, Chunk(kind="score", load=once, clients=asked))
    return columns


def _private(bench: Bench, name: Literal["alone", "pooled"], rounds: int, valid: Load, test: Load) -> tuple[Chunk, ...]:
    recipe, clients = bench.recipe, range(len(bench.train))
    source = stations(bench)[f"alone {grid_name(recipe.optimizer.lr[0])}"].source
    trained, seen = marks(bench, rounds)
    rates = len(recipe.optimizer.lr)
    trial = min(recipe.optimizer.grid_rounds or rounds, rounds)
    chosen = 0 if rates == 1 else rates + (trial < rounds)  # every rate once by its kept best, the best again
    count = len(clients)
    keep: Kind = "alone.keep" if name == "alone" else "pooled.keep"
    score: Kind = "alone.score" if name == "alone" else "pooled.score"
    rows = [(clients, seed, times) for seed, times in zip(_round_seeds(bench, rounds), trained, strict=True)]
    return (
        Chunk(kind=name, load=_trained(source, rows), clients=count * sum(trained)),
        Chunk(kind=keep, load=valid.times(sum(seen)), clients=count * sum(seen)),
        Chunk(kind=score, load=valid.times(chosen) + test, clients=count * (chosen + 1)),
    )


def invitations(bench: Bench) -> list[tuple[int, ...]]:
    """Who will be invited to each round of the federated column."""
    sampler = sampler_of(bench)
    weight_N = torch.tensor([shard.size for shard in bench.train], dtype=torch.float64)
    seeds = _round_seeds(bench, bench.recipe.federation.rounds)
    return [sampler.invite(weight_N, derive(seed, "invite")) for seed in seeds]
