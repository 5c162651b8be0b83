"""Runs a task as the server alone: rows stay at the nodes, and this process opens none of their files.

The nodes declare themselves, train, validate and test, each time asked by a job. So the columns are those that jobs can
fill: ``base``, ``federated``, ``alone`` and ``alone_best``. ``pooled`` would need everybody's rows in one place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from lichen.clients.statistics.declare import enrol
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.roster import PARTS, Roster
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.present.trace import read_trace
from lichen.recipes.artifacts.inputs import Inputs, agree
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.column import Column, recipe_engine
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.open_server import open_server, refuse_rows
from lichen.recipes.tasks.adapt import save_result
from lichen.recipes.tasks.coverage import trained
from lichen.recipes.tasks.learning import EventObserver, federated_column, scored
from lichen.recipes.tasks.outcome import TaskResult, over_all_rows
from lichen.recipes.tasks.private_columns import alone_columns

__all__ = ["run_server_alone"]


def run_server_alone(
    recipe: Recipe, folder: RunFolder, observer: EventObserver, say: Callable[[str], None]
) -> TaskResult:
    """Any task that is learned in rounds, without a row in this process.

    Raises:
        LichenError: if the recipe needs rows at the server, by its key.
    """
    refuse_rows(recipe)
    with ExitStack() as stack:
        say("asking the nodes who takes part")
        store = ClientStore(folder.path / "state" / "none")
        roster = enrol(recipe_engine(recipe, folder, store, stack, local=_no_rows))
    save_roster(folder, roster)
    say(f"{len(roster)} clients, {sum(roster.rows('train')):,} rows to train on")
    loaded = open_server(recipe, roster, say=say)
    server = loaded.server
    agree(folder, recipe, _inputs(server))
    save_class_names(folder, server.classes)
    columns = _columns(server, folder, observer, say)
    best = columns["federated"].shared or Shared()
    save_result(folder, recipe, best, loaded.foundation, loaded.tokenizer, server.classes)
    return TaskResult(
        columns=columns,
        clients=roster.names,
        extra={} if recipe.writes else over_all_rows(recipe, columns),
        validators=len(validators_of(server)),
        counts=tuple(_counts(roster)),
        training=trained(lambda _: server, columns, read_trace(folder.path)),
    )


def _no_rows() -> LocalEngine:
    raise LichenError("this process has no rows", where="engine.name", fix="use spawned")


def _columns(
    server: ServerSide, folder: RunFolder, observer: EventObserver, say: Callable[[str], None]
) -> dict[str, Column]:
    recipe = server.recipe
    columns: dict[str, Column] = {}
    with ExitStack() as stack:

        def engine(store: ClientStore) -> Engine:
            return recipe_engine(recipe, folder, store, stack, local=_no_rows, start=server.start)

        if "base" in recipe.compare.baselines and recipe.writes:
            say("the nodes score the foundation model as it is")
            nodes = engine(ClientStore(folder.path / "state" / "none"))
            metrics = folder.tree("base", partial(scored, server, nodes, server.start))
            columns["base"] = Column(value_N=values_N(recipe, metrics), metrics=metrics)
        columns["federated"] = federated_column(server, folder, observer, engine)
        columns |= alone_columns(server, folder, observer, engine)
    return columns


def _inputs(server: ServerSide) -> Inputs:
    """What the run is made from, as far as a server can know it."""
    roster = server.roster
    model = hashlib.sha256(f"{server.model.base} {digest(server.start.flat())}".encode()).hexdigest()
    return Inputs(rows=sum(sum(roster.rows(part)) for part in PARTS), data=roster.digest(), model=model)


def _counts(roster: Roster) -> list[dict[str, int | None]]:
    return [{**{part: member.rows.get(part, 0) for part in PARTS}, "cut": None} for member in roster]
