"""Counts what each column trains and evaluates, before anything runs.

Invitations and batches follow from the seed, so that the very rows of a run can be counted from its shards: who
is invited to which round, how many tokens that client's batches hold, how often everybody validates. A budget of
very many rounds is counted on some of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from lichen.algorithms.scores import is_validated
from lichen.core.contracts.client import Source
from lichen.core.seeds import derive
from lichen.recipes.assemble.aggregation import local_params_of, sampler_of
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.parts import client_tasks, validators_of
from lichen.recipes.assemble.sides.personal import stages_of
from lichen.recipes.assemble.sides.server import participants
from lichen.recipes.assemble.workload import (
    Workload,
    alone_rounds,
    pooled_experiment,
    trial_rounds,
    unbudgeted,
    workload_of,
)
from lichen.recipes.rows.prepare import first_of
from lichen.recipes.schema.recipe import Recipe
from lichen.server.sampling import Uniform
from lichen.server.value.game import most_evaluations

__all__ = [
    "Kind",
    "WorkItem",
    "budget",
    "evaluated",
    "evaluations",
    "invitations",
    "marks",
    "round_seeds",
]

Kind = Literal["train", "score", "alone", "alone.keep", "alone.score", "pooled", "pooled.keep", "pooled.score"]
"""Works that take their own time: federated training, scoring shared tensors, and private ones."""

COUNTED = 2000
"""Trainings of one client that are counted one by one; more are counted on so many of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class WorkItem:
    """All work of one kind in one column.

    Attributes:
        kind: Which work.
        workload: What it sees, all rounds and learning rates together.
        clients: How often a client is asked.
    """

    kind: Kind
    workload: Workload
    clients: float


def round_seeds(experiment: Experiment, rounds: int) -> list[int]:
    """The seeds of a column's rounds, as the run derives them."""
    run = derive(experiment.recipe.seed, "run")
    return [derive(run, "round", r) for r in range(rounds)]


def marks(experiment: Experiment, rounds: int, *, every: int | None = None) -> tuple[list[int], list[int]]:
    """How often each round is trained, and validated, over the whole grid; round 1 comes first.

    With several learning rates all are tried for ``grid_rounds``, validating the last of them; the best
    one goes on.

    Args:
        experiment: The recipe's.
        rounds: Of the column.
        every: Rounds between validations; None: as the recipe says.
    """
    recipe = experiment.recipe
    rates, every = len(recipe.optimizer.lr), every or recipe.federation.valid_every
    trial = trial_rounds(recipe, rounds)
    trained = [rates if r <= trial else 1 for r in range(1, rounds + 1)]
    ends = {r for r in range(1, rounds + 1) if is_validated(r, every, trial) or is_validated(r, every, rounds)}
    seen = [t * (r in ends) for r, t in enumerate(trained, start=1)]
    return trained, seen


def evaluated(source: Source, clients: Sequence[int], seed: int = 0) -> Workload:
    """What these clients' batches hold."""
    return sum((workload_of(batch) for c in clients for batch in source.batches((c,), seed)), Workload())


def _trained(source: Source, rounds: Sequence[tuple[Sequence[int], int, int]]) -> Workload:
    """Rounds of (clients, seed, times), counted on every n-th training where they are very many."""
    every = max(1, math.ceil(sum(len(clients) for clients, _, _ in rounds) / COUNTED))
    jobs: Iterator[tuple[int, int, int]] = ((c, seed, times) for clients, seed, times in rounds for c in clients)
    total, weight, all_weight = Workload(), 0, 0
    for i, (client, seed, times) in enumerate(jobs):
        all_weight += times
        if i % every == 0:
            total, weight = total + evaluated(source, (client,), seed).times(times), weight + times
    return total.times(all_weight / weight) if weight != all_weight else total


def budget(experiment: Experiment, invited: Sequence[Sequence[int]]) -> dict[str, tuple[WorkItem, ...]]:
    """The work of every column that is compared, and of the federated one.

    Args:
        experiment: The recipe's.
        invited: The clients of every round, see :func:`invitations`.
    """
    recipe, everyone = experiment.recipe, range(len(experiment.server.roster))
    source = client_tasks(experiment)[f"train {lr_name(recipe.optimizer.lr[0])}"].source
    valid = evaluated(experiment.evaluating(experiment.clients.valid), everyone)
    test = evaluated(experiment.evaluating(experiment.clients.test), everyone)
    # A test set that clients share is scored once for all of them where they score one model.
    shared = sorted(set(first_of(experiment.clients.test)))
    own = bool(local_params_of(recipe))
    once = test if own else evaluated(experiment.evaluating(experiment.clients.test), shared)
    scored_clients = len(experiment.server.roster) if own else len(shared)
    judges = validators_of(experiment.server)
    columns: dict[str, tuple[WorkItem, ...]] = {}
    if "base" in recipe.compare.baselines and recipe.writes:
        columns["base"] = (WorkItem(kind="score", workload=once, clients=scored_clients),)
    seeds = round_seeds(experiment, recipe.federation.rounds)
    trained, seen = marks(experiment, recipe.federation.rounds)
    seen = seen if recipe.noised is None else [0] * len(seen)
    columns["federated"] = (
        WorkItem(
            kind="train",
            workload=_trained(source, list(zip(invited, seeds, trained, strict=True))),
            clients=sum(len(who) * t for who, t in zip(invited, trained, strict=True)),
        ),
        WorkItem(
            kind="score",
            workload=evaluated(experiment.evaluating(experiment.clients.valid), judges).times(sum(seen)) + once,
            clients=len(judges) * sum(seen) + scored_clients,
        ),
    )
    if recipe.value is not None:
        columns["federated"] = (*columns["federated"], _valuing(experiment, invited, trained))
    if recipe.personal is not None or recipe.federation.reward != "none":
        columns["personal"] = _personal(experiment, valid, test)
    if "alone" in recipe.compare.baselines:
        columns["alone"] = _private(experiment, "alone", alone_rounds(experiment.server), valid, test)
    if "alone_best" in recipe.compare.baselines:
        columns["alone_best"] = _unbudgeted(experiment, test)
    if "pooled" in recipe.compare.baselines:
        pooled = pooled_experiment(experiment)
        parts = [evaluated(pooled.evaluating(part), (0,)) for part in (pooled.clients.valid, pooled.clients.test)]
        mine = _private(pooled, "pooled", recipe.federation.rounds, *parts)
        columns["pooled"] = (*mine, WorkItem(kind="score", workload=once, clients=scored_clients))
    return columns


def evaluations(recipe: Recipe, invited: Sequence[Sequence[int]], times: Sequence[int]) -> int:
    """Coalitions that are judged at most, each round so many times, if everybody comes."""
    value = recipe.value
    if value is None:
        return 0
    rounds = enumerate(zip(invited, times, strict=True), start=1)
    return sum(t * most_evaluations(value.kind, len(who)) for r, (who, t) in rounds if who and r % value.every == 0)


GRADIENT = 3
"""Evaluations that take as long as a gradient."""


def _valuing(experiment: Experiment, invited: Sequence[Sequence[int]], trained: Sequence[int]) -> WorkItem:
    """Judging coalitions, by all learning rates together; a gradient counts as three evaluations."""
    recipe, server = experiment.recipe, experiment.server
    assert recipe.value is not None
    judged = evaluations(recipe, invited, trained)
    if recipe.value.kind == "first":
        judged *= 1 + GRADIENT
    if recipe.value.rows == "public":
        assert server.labelled is not None
        rows, judges = evaluated(experiment.evaluating([server.labelled]), (0,)), 1
    else:
        clients = validators_of(server)
        rows, judges = evaluated(experiment.evaluating(experiment.clients.valid), clients), len(clients)
    return WorkItem(kind="score", workload=rows.times(judged), clients=judged * judges)


def _private(
    experiment: Experiment, name: Literal["alone", "pooled"], rounds: int, valid: Workload, test: Workload
) -> tuple[WorkItem, ...]:
    recipe, clients = experiment.recipe, range(len(experiment.server.roster))
    source = _alone_source(experiment)
    trained, seen = marks(experiment, rounds)
    rates = len(recipe.optimizer.lr)
    chosen = (
        0 if rates == 1 else rates + (trial_rounds(recipe, rounds) < rounds)
    )  # every rate once by its kept best, the best again
    count = len(clients)
    keep: Kind = "alone.keep" if name == "alone" else "pooled.keep"
    score: Kind = "alone.score" if name == "alone" else "pooled.score"
    rows = [(clients, seed, times) for seed, times in zip(round_seeds(experiment, rounds), trained, strict=True)]
    return (
        WorkItem(kind=name, workload=_trained(source, rows), clients=count * sum(trained)),
        WorkItem(kind=keep, workload=valid.times(sum(seen)), clients=count * sum(seen)),
        WorkItem(kind=score, workload=valid.times(chosen) + test, clients=count * (chosen + 1)),
    )


def _personal(experiment: Experiment, valid: Workload, test: Workload) -> tuple[WorkItem, ...]:
    """Scores of the clients' own models, and what is trained and validated of them after the rounds."""
    tasks, clients = client_tasks(experiment), range(len(experiment.server.roster))
    lr, stages = lr_name(experiment.recipe.optimizer.lr[0]), stages_of(experiment.recipe)
    if not stages:
        return (WorkItem(kind="score", workload=test, clients=len(clients)),)
    seeds = round_seeds(experiment, len(stages))
    training = [
        _trained(tasks[f"personal {lr}{at}"].source, [(clients, seed, 1)])
        for at, seed in zip(stages, seeds, strict=True)
    ]
    count = len(clients) * len(stages)
    return (
        WorkItem(kind="alone", workload=sum(training, Workload()), clients=count),
        WorkItem(kind="alone.keep", workload=valid.times(len(stages)), clients=count),
        WorkItem(kind="alone.score", workload=test, clients=len(clients)),
    )


def _unbudgeted(experiment: Experiment, test: Workload) -> tuple[WorkItem, ...]:
    """The most that clients train alone until they gain no more."""
    free, source = unbudgeted(experiment.server), experiment.evaluating(experiment.clients.valid)
    valid_N = [evaluated(source, (client,)) for client in range(len(experiment.server.roster))]
    trained, seen = marks(experiment, free.rounds, every=free.every)
    training, keeping, scoring = _private(experiment, "alone", free.rounds, sum(valid_N, Workload()), test)
    rows = [
        (free.training(r), seed, times)
        for r, (seed, times) in enumerate(zip(round_seeds(experiment, free.rounds), trained, strict=True))
    ]
    judged_N = [sum(seen[:most]) for most in free.rounds_N]
    return (
        replace(
            training,
            workload=_trained(_alone_source(experiment), rows),
            clients=sum(len(who) * times for who, _, times in rows),
        ),
        replace(
            keeping,
            workload=sum((valid.times(n) for valid, n in zip(valid_N, judged_N, strict=True)), Workload()),
            clients=sum(judged_N),
        ),
        scoring,
    )


def _alone_source(experiment: Experiment) -> Source:
    return client_tasks(experiment)[f"alone {lr_name(experiment.recipe.optimizer.lr[0])}"].source


def invitations(experiment: Experiment) -> list[tuple[int, ...]]:
    """Who will be invited to each round of the federated column."""
    server, weight_N = experiment.server, experiment.server.roster.rows_N("train")
    # Which of those at work answer first is the clock's to say; how many is not.
    buffered = server.recipe.federation.schedule.kind == "buffered"
    sampler = Uniform(participants(server)) if buffered else sampler_of(server)
    seeds = round_seeds(experiment, experiment.recipe.federation.rounds)
    return [sampler.invite(weight_N, derive(seed, "invite")) for seed in seeds]
