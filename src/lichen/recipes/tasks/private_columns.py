"""Learns the columns of clients by themselves, over any engine: alone, alone_best, and pooled, which is one client's.

``alone`` has a client's share of the federation's rounds. ``alone_best`` has none: every client goes on until it has
stopped gaining, at a learning rate that stays where it is after its warm-up, for nobody knows when it should fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lichen.algorithms.alone import Alone, UntilBest
from lichen.algorithms.scores import mean_loss, score, score_everyone
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.recipes.assemble.column import Column, admission_of
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.parts import lr_scale
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.workload import Unbudgeted, alone_rounds, unbudgeted
from lichen.recipes.tasks.learning import Engines, EventObserver, choose_learning_rate, go_rounds, observing

__all__ = ["alone_columns", "private_column", "stops", "until_best"]


def alone_columns(
    server: ServerSide, folder: RunFolder, observer: EventObserver, engines: Engines
) -> dict[str, Column]:
    """Every client by itself: ``alone`` and ``alone_best``, those of them that the recipe compares with."""
    columns, baselines = dict[str, Column](), server.recipe.compare.baselines
    if "alone" in baselines:
        rounds = alone_rounds(server)
        columns["alone"], _ = private_column(server, folder, observer, engines, name="alone", rounds=rounds)
    if "alone_best" in baselines:
        free = unbudgeted(server)
        columns["alone_best"], _ = private_column(
            server, folder, observer, engines, name="alone_best", rounds=free.rounds, free=free
        )
    return columns


def private_column(
    server: ServerSide,
    folder: RunFolder,
    observer: EventObserver,
    engines: Engines,
    *,
    name: str,
    rounds: int,
    free: Unbudgeted | None = None,
) -> tuple[Column, ClientStore]:
    """Train clients by themselves at every learning rate; the column of the best one, and its private state.

    Args:
        server: The server's side.
        folder: The run folder.
        observer: Sees every round.
        engines: Make an engine for each rate.
        name: The column's.
        rounds: Rounds in all.
        free: Until when each client goes on within them; None: all to the end.
    """
    recipe, clients = server.recipe, tuple(range(len(server.roster)))
    admission, schedule = admission_of(server), recipe.federation.schedule
    made: dict[float, Engine] = {}
    stores: dict[float, ClientStore] = {}

    def tested(lr: float, until: int, work: str) -> Tree:
        job = Job(work=work, shared=server.start, version=2 * until, clients=clients, seed=0, base=server.model.base)
        ask, within = score_everyone if work == "alone.test" else score, schedule.scoring_seconds
        return folder.tree(
            f"{name}.{work}.{lr_name(lr)}.{until}", lambda: ask(made[lr], job, admission, within=within)[1]
        )

    def go(lr: float, until: int) -> float:
        stores[lr] = ClientStore(folder.clients(name, lr_name(lr)), listed=True)
        made[lr] = engines(stores[lr])
        alone = Alone(
            clients=len(clients),
            rounds=until,
            work=f"alone {lr_name(lr)}",
            valid="alone.valid",
            valid_every=free.every if free else recipe.federation.valid_every,
            lr_scale=free.lr_scale if free else lr_scale(recipe, rounds),
            base=server.model.base,
            admission=admission,
            deadline=schedule.seconds if recipe.engine.clock is None else math.inf,
            scoring=schedule.scoring_seconds,
        )
        checkpoint, observe = folder.checkpoint(name, lr_name(lr)), observing(observer, name, lr, rounds)
        algorithm = until_best(alone, free) if free else alone
        once, stop = folder.ranks.ask_first, stops(algorithm) if isinstance(algorithm, UntilBest) else None
        go_rounds(
            server, algorithm, made[lr], until, checkpoint, observe, once, folder.save, initial=server.start, stop=stop
        )
        return mean_loss(tested(lr, until, "alone.chosen")) if len(recipe.optimizer.lr) > 1 else 0.0

    lr = choose_learning_rate(recipe, rounds, go)
    metrics = tested(lr, rounds, "alone.test")
    chooses = recipe.personal is not None and recipe.personal.choose
    valid = tested(lr, rounds, "alone.chosen") if chooses else None
    return Column(value_N=values_N(recipe, metrics), metrics=metrics, lr=lr, valid=valid), stores[lr]


def until_best(alone: Alone, free: Unbudgeted) -> UntilBest:
    """Private training in which every client goes on for as long as it gains."""
    return UntilBest(alone=alone, patience=free.patience, rounds_N=free.rounds_N, warmup=free.warmup)


def stops(algorithm: UntilBest) -> Callable[[ServerState], bool]:
    """Whether nobody goes on."""
    return lambda state: not algorithm.training(state)
