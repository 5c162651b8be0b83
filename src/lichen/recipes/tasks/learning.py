"""Learns the federated column, over any engine, and what all columns of rounds have in common.

Nothing here holds a row: a server's side and what makes an engine are enough. Each column chooses its learning rate and
its best round on validation rows, and is scored once on test rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from lichen.algorithms.agnostic import AFL
from lichen.algorithms.average import Average
from lichen.algorithms.realigned import Realigned
from lichen.algorithms.scores import score_everyone, score_summed
from lichen.algorithms.semi import SemiFL
from lichen.algorithms.tilted import Tilted
from lichen.core import tree as trees
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import drain
from lichen.core.collecting.history import History
from lichen.core.collecting.rollback import with_rollback
from lichen.core.contracts.algorithm import Algorithm, Report, ServerState
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.rounds import run, save_state
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.augment import WeaklyViewed
from lichen.data.batches.shards import TrainSource
from lichen.engines.local import LocalEngine
from lichen.present.trace import Event
from lichen.recipes.assemble.aggregation import local_params_of, weighting_of
from lichen.recipes.assemble.column import NOBODY, Column, admission_of, column_of
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.parts import (
    algorithm_of,
    initial_shared,
    lr_scale,
    tensors_of,
    trainer,
)
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.personal import trains_own
from lichen.recipes.assemble.sides.privacy import PrivateRounds, private_rounds
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.sides.summed_scores import SUMMED_TEST
from lichen.recipes.assemble.workload import stop_of, trial_rounds
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.repair import repaired
from lichen.recipes.value.rewards import earned, rewards
from lichen.recipes.value.rounds import valued
from lichen.server.robust.fltrust import FLTrust, Reference

__all__ = [
    "HISTORY",
    "Engines",
    "EventObserver",
    "choose_learning_rate",
    "federate",
    "federated_column",
    "go_rounds",
    "observing",
    "own_column",
    "scored",
]

EventObserver = Callable[[Event], None]
Engines = Callable[[ClientStore], Engine]
"""Makes the engine of one learning rate, whose clients keep their private state in this store."""

HISTORY = "history"
"""Folder beside a checkpoint, of the messages that its rounds have counted."""

Scores = Literal["each", "summed", "none"]

Once = Callable[[Callable[[], None]], object]
Save = Callable[[Path, ServerState], object]


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
    admission: Admission | None = None,
    once: Once = lambda do: do(),
    save: Save = save_state,
    private: PrivateRounds | None = None,
) -> ServerState:
    """The federated column at one learning rate, up to round ``until``; see :func:`lichen.core.rounds.run`.

    Under privacy its rounds end before one that cannot be paid for.
    """
    average = replace(
        algorithm_of(server, lr, until),
        admission=admission or admission_of(server),
        history=History(checkpoint.parent / HISTORY) if server.recipe.federation.history else None,
    )
    if server.align is not None and server.recipe.offsite is not None and server.recipe.offsite.realign is not None:
        every = server.recipe.offsite.realign.every
        average = replace(average, optimizer=Realigned(average.optimizer, every=every, align=server.align))
    if private is not None:
        algorithm: Algorithm = private.around(average)
    else:
        algorithm = _with_server(server, average, lr, checkpoint.parent / "server")
    stop = None if private is None else lambda state: private.ended(state.round)
    initial = initial_shared(server, lr)
    return go_rounds(server, algorithm, engine, until, checkpoint, observer, once, save, initial=initial, stop=stop)


def _own_change(server: LocalEngine, seed: int, scale: Callable[[int], float]) -> Reference:
    """The server's own change of a round, as a client's with the server's rows."""

    def change(shared: Shared, version: int) -> Tree:
        job = Job(
            work="server",
            shared=shared,
            version=version,
            clients=(0,),
            seed=derive(seed, version),
            base=server.base,
            settings={"lr_scale": scale(version)},
        )
        (message,) = drain(server, job)
        return trees.take(message.tensors, 0)

    return change


def _with_server(side: ServerSide, clients: Average, lr: float, folder: Path) -> Algorithm:
    """The federation, with values, fair weights or the server's own training where the recipe has them."""
    recipe, rows = side.recipe, side.labelled
    if recipe.value is not None:
        return valued(side, clients, folder, lr)
    if recipe.federation.reward == "cgsv":
        return rewards(side, clients, folder)
    if recipe.federation.fair == "minmax":
        return AFL(clients, rate=recipe.federation.fair_rate)
    if recipe.federation.fair == "tilted":
        return Tilted(clients, tilt=recipe.federation.tilt, weighting=weighting_of(recipe))
    fed, robust = recipe.federation, recipe.federation.robust
    trusts = robust is not None and robust.asks_server
    if rows is None or (recipe.semi is None and not trusts):
        return clients
    source: Source = TrainSource(
        (rows,),
        batch_size=fed.batch_size,
        steps=fed.local_steps or 1 if recipe.semi is None else recipe.semi.server_steps,
        epochs=fed.local_epochs if recipe.semi is None else None,
        pad=side.pad,
        max_length=recipe.data.max_length,
    )
    if side.views is not None:
        source = WeaklyViewed(source, side.views)
    server = LocalEngine(
        {"server": ClientTask(work=trainer(side, lr), source=source)},
        ClientStore(folder, listed=True),
        base=side.model.base,
        device=recipe.model.device,
    )
    scale = lr_scale(recipe, fed.rounds)
    if trusts:
        return replace(clients, aggregator=FLTrust(_own_change(server, derive(recipe.seed, "reference"), scale)))
    return SemiFL(
        clients,
        server=server,
        seed=derive(recipe.seed, "server"),
        lr_scale=lambda r: scale(max(r, 0)),
    )


def go_rounds(
    server: ServerSide,
    algorithm: Algorithm,
    engine: Engine,
    rounds: int,
    checkpoint: Path,
    observer: Callable[[Report], None],
    once: Once,
    save: Save,
    *,
    initial: Shared,
    stop: Callable[[ServerState], bool] | None = None,
) -> ServerState:
    """Rounds of a column by the recipe's seed, until ``stop``; None: until the recipe has no patience left."""
    return run(
        algorithm,
        engine,
        lambda: initial,
        rounds=rounds,
        seed=derive(server.recipe.seed, "run"),
        checkpoint=checkpoint,
        once=once,
        save=save,
        stop=stop or stop_of(server.recipe),
        observers=[observer],
    )


def observing(observer: EventObserver, column: str, lr: float, rounds: int) -> Callable[[Report], None]:
    """Tells the observer of a column's rounds."""
    return lambda report: observer(Event(column=column, report=report, total_rounds=rounds, grid=lr_name(lr)))


def scored(
    server: ServerSide,
    engine: Engine,
    shared: Shared,
    *,
    work: str = "test",
    version: int = 0,
    admission: Admission | None = None,
    summed: bool = False,
    rollback: Mapping[int, int] | None = None,
) -> Tree:
    """Everybody's sums over its own test rows, ``(N, ...)``, with these tensors.

    Args:
        server: The server's side.
        engine: Asks the clients.
        shared: The tensors.
        work: The evaluation that is asked for.
        version: Of the private state that goes with them.
        admission: What counts of the answers; None: by the server's side alone.
        summed: Ask for the sums of all clients alone, ``(1, ...)``, under masks.
        rollback: By client, since when its answers did not count, where private state goes with them.

    Raises:
        LichenError: if a client could not say, or was not there; of sums, or with a deadline for scores, if nobody was.
    """
    everyone = tuple(range(len(server.roster)))
    work, admission = SUMMED_TEST if summed else work, admission or admission_of(server)
    job = Job(work=work, shared=shared, version=version, clients=everyone, seed=0, base=server.model.base)
    job = with_rollback(job, {client: before for client, before in (rollback or {}).items() if before < version})
    if summed:
        return score_summed(engine, job, admission)
    return score_everyone(engine, job, admission, within=server.recipe.federation.schedule.scoring_seconds)[1]


def own_column(server: ServerSide, folder: RunFolder, label: str, ask: Callable[..., Tree]) -> Column:
    """The clients' own models on their test rows, and on the rows by which they choose or are held against others.

    Args:
        server: The server's side.
        folder: The run folder.
        label: What the numbers are called there.
        ask: Gives the sums of a ``work``.
    """
    config = server.recipe.personal
    assert config is not None
    metrics = folder.tree(label, partial(ask, work="personal.test"))
    return Column(
        value_N=values_N(server.recipe, metrics),
        metrics=metrics,
        valid=folder.tree(f"{label}.valid", partial(ask, work="choose.own")) if config.choose else None,
        others=folder.tree(f"{label}.others", partial(ask, work="others.own")) if config.others is not None else None,
    )


def federated_column(
    server: ServerSide,
    folder: RunFolder,
    observer: EventObserver,
    engines: Engines,
    *,
    name: str = "federated",
    test: Callable[[str, Shared], Column] | None = None,
    admission: Admission | None = None,
    scores: Scores = "each",
    own_keys: bool = False,
) -> Column:
    """Rounds at every learning rate, and the best one's tensors on test rows.

    Args:
        server: The server's side.
        folder: The run folder.
        observer: Sees every round.
        engines: Make an engine for each rate.
        name: The column's.
        test: Scores tensors; None: the clients do it over the engine, as they do where some tensors stay with them.
        admission: What counts of what clients send; None: by the server's side alone.
        scores: What clients are asked for of their test rows: each its scores, their sums under masks, or none.
        own_keys: Clients are at sites that have keys of their own, where noise hides rows.
    """
    recipe, rounds = server.recipe, server.recipe.federation.rounds
    private = private_rounds(server, folder.path, folder.ranks, own_keys=own_keys)
    admission = admission or admission_of(server)
    states: dict[float, ServerState] = {}
    made: dict[float, Engine] = {}

    def go(lr: float, until: int) -> float:
        if lr not in made:
            made[lr] = engines(ClientStore(folder.clients(name, lr_name(lr)), listed=True))
        checkpoint, observe = folder.checkpoint(name, lr_name(lr)), observing(observer, name, lr, rounds)
        once = folder.ranks.ask_first
        states[lr] = federate(
            server,
            made[lr],
            lr,
            until,
            checkpoint,
            observe,
            admission=admission,
            once=once,
            save=folder.save,
            private=private,
        )
        return states[lr].best_value

    lr = choose_learning_rate(recipe, rounds, go)
    best, local = states[lr], bool(local_params_of(recipe))
    if best.best_round < 0:  # nothing was judged: the last round it is
        best = replace(best, best=best.shared, best_round=best.round)
    shared = best.best if local else tensors_of(server, lr, best.best)

    def column(label: str, shared: Shared) -> Column:
        if scores == "none":
            found = Column(value_N=NOBODY, metrics={})
        elif test is not None and not local:
            found = test(label, shared)
        else:
            summed = scores == "summed"
            ask = partial(
                scored,
                server,
                made[lr],
                shared,
                version=version,
                admission=admission,
                summed=summed,
                rollback=best.rollback,
            )
            found = column_of(recipe, folder.tree(label, ask), len(server.roster), summed=summed)
        return replace(found, lr=lr, shared=shared, best_round=best.best_round)

    def own() -> Column:
        ask = partial(
            scored, server, made[lr], shared, version=best.best_round, admission=admission, rollback=best.rollback
        )
        return replace(own_column(server, folder, f"{name}.personal", ask), lr=lr, best_round=best.best_round)

    # What stayed at home in the best round lies beside what is newest, under that round's version.
    version = best.best_round if local else 0
    if server.repair is None:
        found, config = column(name, shared), recipe.personal
        if recipe.federation.reward == "cgsv":
            metrics = folder.tree(f"{name}.personal", partial(earned, server, made[lr], states[lr], admission))
            personal = Column(value_N=values_N(recipe, metrics), metrics=metrics, lr=lr, best_round=best.best_round)
            return replace(found, personal=personal)
        if config is None or scores != "each":
            return found
        ask = partial(scored, server, made[lr], shared, work="others.shared", admission=admission)
        others = folder.tree(f"{name}.others", ask) if config.others is not None else None
        return replace(found, personal=own() if trains_own(recipe) else None, others=others)
    before = column(f"{name}.unrepaired", shared)
    return replace(column(name, repaired(server, folder, shared, lr=lr, name=name)), unrepaired=before)
