"""Trains and scores the columns base, alone, federated and pooled.

Every trained column spends the same budget: the federation trains R rounds of P clients with S steps
of B rows. Alone, each of N clients takes its share of those rounds; pooled, one client that owns
everybody's rows takes as many rows in all. Each column chooses its learning rate and its best round
on validation rows, and is scored once on test rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from lichen.algorithms.agnostic import AFL
from lichen.algorithms.alone import Alone
from lichen.algorithms.average import Average, mean_loss, score
from lichen.algorithms.semi import SemiFL
from lichen.core import tree as trees
from lichen.core.contracts import Algorithm, ClientTask, Engine, Report, ServerState
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.data.batches.shards import TrainSource
from lichen.engines.kinds import EngineSettings
from lichen.engines.local import LocalEngine
from lichen.present.trace import Event
from lichen.recipes.assemble.aggregation import local_params_of
from lichen.recipes.assemble.column import Column, local_engine, over_ranks
from lichen.recipes.assemble.experiment import Experiment, lr_name, values_N
from lichen.recipes.assemble.parts import algorithm_of, initial_shared, lr_scale, stop_of, tensors_of, trainer
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.workload import alone_rounds, pooled_experiment, trial_rounds
from lichen.recipes.rows.prepare import first_of
from lichen.recipes.schema.recipe import Recipe
from lichen.transforms.delta import snapshot_name

__all__ = [
    "EventObserver",
    "adapt",
]

EventObserver = Callable[[Event], None]
Once = Callable[[Callable[[], None]], object]


def choose_learning_rate(recipe: Recipe, rounds: int, go: Callable[[float, int], float]) -> float:
    """The learning rate with the least validation loss, its rounds all done.

    Args:
        recipe: Its rates, and for how many rounds each is tried.
        rounds: Rounds in all.
        go: Brings one rate to so many rounds, from where it stands; gives its validation loss.
    """
    rates, trial = recipe.optimizer.lr, trial_rounds(recipe, rounds)
    losses = {lr: go(lr, trial) for lr in rates} if len(rates) > 1 else {rates[0]: 0.0}
    best = min(losses, key=lambda lr: math.inf if math.isnan(losses[lr]) else losses[lr])
    go(best, rounds)
    return best


def federate(
    server: ServerSide,
    engine: Engine,
    lr: float,
    until: int,
    checkpoint: Path,
    observer: Callable[[Report], None],
    *,
    once: Once = lambda do: do(),
) -> ServerState:
    """The federated column at one learning rate, up to round ``until``; see :func:`lichen.core.rounds.run`."""
    algorithm = _with_server(server, algorithm_of(server, lr, until), lr, checkpoint.parent / "server")
    return _go(server, algorithm, engine, until, checkpoint, observer, once, initial=initial_shared(server, lr))


def _with_server(side: ServerSide, clients: Average, lr: float, folder: Path) -> Algorithm:
    """The federation, with fair weights or the server's own training between rounds where the recipe has them."""
    recipe, rows = side.recipe, side.labelled
    if recipe.federation.fair == "minmax":
        return AFL(clients, rate=recipe.federation.fair_rate)
    if rows is None or recipe.semi is None:
        return clients
    fed = recipe.federation
    source = TrainSource(
        (rows,),
        batch_size=fed.batch_size,
        steps=recipe.semi.server_steps,
        pad=side.pad,
        max_length=recipe.data.max_length,
    )
    server = LocalEngine(
        {"server": ClientTask(work=trainer(side, lr), source=source)},
        ClientStore(folder),
        base=side.model.base,
        device=recipe.model.device,
    )
    scale = lr_scale(recipe, fed.rounds)
    return SemiFL(
        replace(clients, agreed=False),
        server=server,
        seed=derive(recipe.seed, "server"),
        lr_scale=lambda r: scale(max(r, 0)),
    )


def _go(
    server: ServerSide,
    algorithm: Algorithm,
    engine: Engine,
    rounds: int,
    checkpoint: Path,
    observer: Callable[[Report], None],
    once: Once,
    *,
    initial: Tree,
) -> ServerState:
    return run(
        algorithm,
        engine,
        lambda: initial,
        rounds=rounds,
        seed=derive(server.recipe.seed, "run"),
        checkpoint=checkpoint,
        once=once,
        stop=stop_of(server.recipe),
        observers=[observer],
    )


def adapt(
    experiment: Experiment,
    folder: RunFolder,
    observer: EventObserver,
    say: Callable[[str], None],
    *,
    plain: Experiment | None = None,
) -> dict[str, Column]:
    """Run the federated column and those it is compared with.

    Args:
        experiment: What the federated column works with.
        folder: The run folder.
        observer: Sees every round.
        say: Called with lines of progress.
        plain: What the other columns work with, where the federation has help they have not.
    """
    plain = plain or experiment
    recipe = experiment.recipe
    engine = over_ranks(folder.ranks, local_engine(experiment, ClientStore(folder.path / "state" / "none")))

    # A test set that clients share is scored once for all of them, since they score one model.
    first = torch.tensor(first_of(experiment.clients.test))
    distinct, place_N = torch.unique(first, return_inverse=True)

    def test(name: str, shared: Tree) -> Column:
        clients = tuple(distinct.tolist())
        job = Job(work="test", shared=shared, version=0, clients=clients, seed=0, base=experiment.model.base)

        def scores() -> Tree:
            return {key: x_M[place_N] for key, x_M in score(engine, job)[1].items()}

        metrics = folder.tree(name, scores)
        return Column(value_N=values_N(recipe, metrics), metrics=metrics)

    columns: dict[str, Column] = {}
    if "base" in recipe.compare.baselines and recipe.writes:
        say("scoring the foundation model as it is")
        columns["base"] = test("base", experiment.start)
    columns["federated"] = _federated(experiment, folder, observer, test, "federated")
    if "no_help" in recipe.compare.baselines:
        columns["without"] = _federated(plain, folder, observer, test, "without")
    if "alone" in recipe.compare.baselines:
        columns["alone"] = _alone(plain, folder, observer)
    if "pooled" in recipe.compare.baselines:
        columns["pooled"] = _pooled(plain, folder, observer, test)
    return columns


def _observer(observer: EventObserver, column: str, lr: float, rounds: int) -> Callable[[Report], None]:
    return lambda report: observer(Event(column=column, report=report, total_rounds=rounds, grid=lr_name(lr)))


def _federated(
    experiment: Experiment, folder: RunFolder, observer: EventObserver, test: Callable[[str, Tree], Column], name: str
) -> Column:
    recipe, rounds = experiment.recipe, experiment.recipe.federation.rounds
    states: dict[float, ServerState] = {}
    with ExitStack() as stack:
        engines: dict[float, Engine] = {}

        def go(lr: float, until: int) -> float:
            if lr not in engines:
                store = ClientStore(folder.clients(name, lr_name(lr)))
                engines[lr] = _engine(experiment, folder, store, stack)
            checkpoint = folder.checkpoint(name, lr_name(lr))
            observe = _observer(observer, name, lr, rounds)
            states[lr] = federate(
                experiment.server, engines[lr], lr, until, checkpoint, observe, once=folder.ranks.ask_first
            )
            return states[lr].best_value

        lr = choose_learning_rate(recipe, rounds, go)
        if local_params_of(recipe):
            # What stayed at home in the best round lies beside what is newest, under that round's version.
            best, everyone = states[lr], tuple(range(len(experiment.server.roster)))
            job = Job(
                work="test",
                shared=best.best,
                version=best.best_round,
                clients=everyone,
                seed=0,
                base=experiment.model.base,
            )
            metrics = folder.tree(name, lambda: score(engines[lr], job)[1])
            value_N = values_N(recipe, metrics)
            return Column(value_N=value_N, metrics=metrics, lr=lr, shared=best.best, best_round=best.best_round)
    best = states[lr]
    shared = tensors_of(experiment.server, lr, best.best)
    tested = test(name, shared)
    return replace(tested, lr=lr, shared=shared, best_round=best.best_round)


def _engine(experiment: Experiment, folder: RunFolder, store: ClientStore, stack: ExitStack) -> Engine:
    recipe = experiment.recipe
    settings = EngineSettings(
        local=lambda: local_engine(experiment, store),
        ranks=folder.ranks,
        command=(
            *(sys.executable, "-m", "lichen", "node"),
            *("--recipe", str(folder.path / "recipe.yaml"), "--state", str(store.folder)),
        ),
        nodes=recipe.engine.nodes,
        agreed=snapshot_name(experiment.start) if recipe.wire.down else "",
    )
    return stack.enter_context(recipe.engine_kind.make(settings))


def _alone(experiment: Experiment, folder: RunFolder, observer: EventObserver) -> Column:
    everyone = tuple(range(len(experiment.server.roster)))
    column, _ = _private(experiment, folder, observer, "alone", alone_rounds(experiment.server), everyone)
    return column


def _pooled(
    experiment: Experiment, folder: RunFolder, observer: EventObserver, test: Callable[[str, Tree], Column]
) -> Column:
    fed = experiment.recipe.federation
    column, store = _private(pooled_experiment(experiment), folder, observer, "pooled", fed.rounds, (0,))
    own = store.load((0,), 2 * fed.rounds)
    assert own is not None
    best, _ = trees.split(trees.take(own, 0), "best/")
    tested = test("pooled.all", best)
    round_number = (int(own["best_version"][0]) + 1) // 2  # a round takes two versions, and judges at the first of them
    return replace(column, value_N=tested.value_N, metrics=tested.metrics, shared=best, best_round=round_number)


def _private(
    experiment: Experiment, folder: RunFolder, observer: EventObserver, name: str, rounds: int, clients: tuple[int, ...]
) -> tuple[Column, ClientStore]:
    """Train clients by themselves at every learning rate; the column of the best one, and its private state."""
    recipe = experiment.recipe
    engines: dict[float, Engine] = {}
    stores: dict[float, ClientStore] = {}

    def scored(lr: float, until: int, work: str) -> Tree:
        job = Job(
            work=work, shared=experiment.start, version=2 * until, clients=clients, seed=0, base=experiment.model.base
        )
        return folder.tree(f"{name}.{work}.{lr_name(lr)}.{until}", lambda: score(engines[lr], job)[1])

    def go(lr: float, until: int) -> float:
        stores[lr] = ClientStore(folder.clients(name, lr_name(lr)))
        engines[lr] = over_ranks(folder.ranks, local_engine(experiment, stores[lr]))
        algorithm = Alone(
            clients=len(clients),
            rounds=until,
            work=f"alone {lr_name(lr)}",
            valid="alone.valid",
            valid_every=recipe.federation.valid_every,
            lr_scale=lr_scale(recipe, rounds),
            base=experiment.model.base,
        )
        checkpoint = folder.checkpoint(name, lr_name(lr))
        observe = _observer(observer, name, lr, rounds)
        _go(
            experiment.server,
            algorithm,
            engines[lr],
            until,
            checkpoint,
            observe,
            folder.ranks.ask_first,
            initial=experiment.start,
        )
        return mean_loss(scored(lr, until, "alone.chosen")) if len(recipe.optimizer.lr) > 1 else 0.0

    lr = choose_learning_rate(recipe, rounds, go)
    tested = scored(lr, rounds, "alone.test")
    return Column(value_N=values_N(recipe, tested), metrics=tested, lr=lr), stores[lr]
