"""Trains and scores the columns base, alone, federated and pooled, alone_best, and personal.

Every trained column but the last spends the same budget: the federation trains R rounds of P clients with S steps
of B rows. Alone, each of N clients takes its share of those rounds; pooled, one client that owns
everybody's rows takes as many rows in all. How each is learned: :mod:`lichen.recipes.tasks.learning`,
:mod:`lichen.recipes.tasks.private_columns` and :mod:`lichen.recipes.tasks.personal_columns`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from lichen.algorithms.scores import score
from lichen.core import tree as trees
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.column import Column, admission_of, local_engine, over_ranks, recipe_engine
from lichen.recipes.assemble.experiment import Experiment, values_N
from lichen.recipes.assemble.parts import works_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.attack import colluding
from lichen.recipes.assemble.sides.masks import unmasking
from lichen.recipes.assemble.sides.privacy import with_secret
from lichen.recipes.assemble.sides.splitting.works import splitting
from lichen.recipes.assemble.sides.withdrawal.absent import without_absent
from lichen.recipes.assemble.workload import pooled_experiment
from lichen.recipes.rows.prepare import first_of
from lichen.recipes.tasks.learning import EventObserver, federated_column
from lichen.recipes.tasks.personal_columns import chosen_column, personal_column
from lichen.recipes.tasks.private_columns import alone_columns, private_column

__all__ = ["adapt", "pooled_column"]


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
    engine = _local(experiment, folder, ClientStore(folder.path / "state" / "none"))

    admission = admission_of(experiment.server)
    # A test set that clients share is scored once for all of them, since they score one model.
    first = torch.tensor(first_of(experiment.clients.test))
    distinct, place_N = torch.unique(first, return_inverse=True)

    def test(name: str, shared: Shared) -> Column:
        clients = tuple(distinct.tolist())
        job = Job(work="test", shared=shared, version=0, clients=clients, seed=0, base=experiment.model.base)

        def scores() -> Tree:
            return {key: x_M[place_N] for key, x_M in score(engine, job, admission)[1].items()}

        metrics = folder.tree(name, scores)
        return Column(value_N=values_N(recipe, metrics), metrics=metrics)

    columns: dict[str, Column] = {}
    if "base" in recipe.compare.baselines and recipe.writes:
        say("scoring the foundation model as it is")
        columns["base"] = test("base", plain.start)
    columns["federated"] = _federated(experiment, folder, observer, test, "federated")
    columns |= personal_column(
        experiment.server, folder, observer, partial(_local, experiment, folder), columns["federated"]
    )
    if "no_help" in recipe.compare.baselines:
        unvalued = plain.with_server(recipe=recipe.model_copy(update={"value": None}))
        columns["without"] = _federated(unvalued, folder, observer, test, "without")
    columns |= alone_columns(plain.server, folder, observer, partial(_local, plain, folder))
    columns |= chosen_column(experiment.server, folder, columns, lambda: engine)
    if "pooled" in recipe.compare.baselines:
        columns["pooled"] = pooled_column(plain, folder, observer, test)
    return columns


def _local(experiment: Experiment, folder: RunFolder, store: ClientStore) -> Engine:
    engine = over_ranks(folder.ranks, local_engine(experiment, store))
    there = without_absent(engine, experiment.clients.absent, folder.ranks)
    return splitting(experiment.server, there, works_of(experiment.server), store)


def _federated(
    experiment: Experiment, folder: RunFolder, observer: EventObserver, test: Callable[[str, Shared], Column], name: str
) -> Column:
    """The federated column, over the engine that the recipe names."""
    server, admission = experiment.server, admission_of(experiment.server, experiment.clients.auxiliary)
    experiment = replace(experiment, clients=with_secret(server, experiment.clients, folder.path))

    def around(store: ClientStore, inner: Engine) -> Engine:
        there = without_absent(inner, experiment.clients.absent, folder.ranks)
        there = splitting(server, colluding(server, there), admission.works, store)
        return unmasking(server.recipe, there, admission.works)

    with ExitStack() as stack:

        def engine(store: ClientStore) -> Engine:
            local = partial(local_engine, experiment, store)
            near = partial(around, store)
            return recipe_engine(server.recipe, folder, store, stack, local=local, start=server.start, around=near)

        return federated_column(server, folder, observer, engine, name=name, test=test, admission=admission)


def pooled_column(
    experiment: Experiment,
    folder: RunFolder,
    observer: EventObserver,
    test: Callable[[str, Shared], Column],
    *,
    name: str = "pooled",
) -> Column:
    """One client with everybody's rows, and the federation's budget.

    Args:
        experiment: What it works with.
        folder: The run folder.
        observer: Sees every round.
        test: Scores tensors on everybody's test rows.
        name: The column's.
    """
    fed, joined = experiment.recipe.federation, pooled_experiment(experiment)
    engines = partial(_local, joined, folder)
    column, store = private_column(joined.server, folder, observer, engines, name=name, rounds=fed.rounds)
    own = store.load((0,), 2 * fed.rounds)
    assert own is not None
    best, _ = trees.split(trees.take(own, 0), "best/")
    shared = Shared(best)
    tested = test(f"{name}.all", shared)
    round_number = (int(own["best_version"][0]) + 1) // 2  # a round takes two versions, and judges at the first of them
    return replace(column, value_N=tested.value_N, metrics=tested.metrics, shared=shared, best_round=round_number)
