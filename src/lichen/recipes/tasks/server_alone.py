"""Runs a task as the server alone: rows stay at the nodes, and this process opens none of their files.

The nodes declare themselves, train, validate and test, each time asked by a job. So the columns are those that jobs can
fill: ``base``, ``federated``, ``personal``, ``alone`` and ``alone_best``. ``pooled`` would need everybody's rows in one
place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
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
from lichen.recipes.assemble.column import Column, agreed_name, clocked, column_of, recipe_engine
from lichen.recipes.assemble.parts import validators_of, works_of
from lichen.recipes.assemble.preference.numbers import preference_numbers
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.sides.fingerprints import register
from lichen.recipes.assemble.sides.masks import unmasking
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.sides.summed_scores import sums_scores
from lichen.recipes.assemble.sides.withdrawal.absent import absent_of, without_absent
from lichen.recipes.rows.checked_cards import Cards
from lichen.recipes.rows.site_rows import refuse_everybodys
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.open_server import open_server, refuse_rows
from lichen.recipes.sites.site_engines import SiteEngines
from lichen.recipes.tasks.adapt import save_result
from lichen.recipes.tasks.coverage import trained
from lichen.recipes.tasks.learning import Engines, EventObserver, Scores, federated_column, scored
from lichen.recipes.tasks.oneshot_alone import solve_alone
from lichen.recipes.tasks.outcome import TaskResult, not_scored, over_all_rows
from lichen.recipes.tasks.personal_columns import chosen_column, personal_column, personal_numbers
from lichen.recipes.tasks.private_columns import alone_columns
from lichen.recipes.tasks.repair import safety
from lichen.recipes.tasks.training_flops import compute_of
from lichen.tasks.registry import task_of

__all__ = ["run_server_alone"]

NO_STATE = "state/none"
"""Where in a run's folder nodes are started that keep no client's state."""

EngineOf = Callable[[ClientStore, ExitStack, Shared | None], Engine]
"""Makes an engine over nodes, whose clients keep their state in this store's folder and begin from these tensors."""

Nodes = tuple[Roster, tuple[str, ...], EngineOf, Cards, bool]
"""Who takes part, the labels they announced, what makes engines, their cards, and if they know one another."""


def run_server_alone(
    recipe: Recipe,
    folder: RunFolder,
    observer: EventObserver,
    say: Callable[[str], None],
    *,
    sites: SiteEngines | None = None,
) -> TaskResult:
    """Any task that is learned in rounds, or solved from statistics, without a row in this process.

    Args:
        recipe: The recipe.
        folder: The run folder.
        observer: Sees every round.
        say: Called with lines of progress.
        sites: Each with rows of its own; None: nodes open the recipe's data.

    Raises:
        LichenError: if the recipe needs rows at the server, or of several sites in one place, by its key.
    """
    refuse_rows(recipe)
    if sites is not None:
        refuse_everybodys(recipe)
    elif not recipe.engine_kind.nodes:
        what = "a server without rows: this engine has no nodes that could hold them"
        raise LichenError(what, where="engine.name", fix="use spawned")
    say("asking the nodes who takes part")
    with ExitStack() as stack:
        if sites is not None:
            stack.callback(sites.close)
        nodes = _nodes(recipe, folder) if sites is None else _site_nodes(recipe, folder, sites, say)
        result = replace(
            _learned(recipe, folder, observer, say, nodes, apart=sites is not None), cards=nodes[3], signed=nodes[4]
        )
        left_out = {} if sites is None else {name: f"left out: {why}" for name, why in sites.left_out.items()}
        departed = frozenset() if sites is None else sites.departed()
        return replace(result, extra={**result.extra, **left_out}, departed=departed)


def _learned(
    recipe: Recipe, folder: RunFolder, observer: EventObserver, say: Callable[[str], None], nodes: Nodes, *, apart: bool
) -> TaskResult:
    """The task's result, with these nodes; each has a folder of its own where they are apart."""
    roster, labels, engine_of, cards, _ = nodes
    save_roster(folder, roster, cards)
    say(f"{len(roster)} clients, {sum(roster.rows('train')):,} rows to train on")
    if not task_of(recipe.task).procedure.rounds:
        with ExitStack() as stack:
            engines: Engines = lambda store: engine_of(store, stack, None)  # noqa: E731
            solved = solve_alone(recipe, folder, observer, say, roster, labels, engines)
            return replace(solved, counts=tuple(_counts(roster)))
    loaded = open_server(recipe, roster, labels=labels, say=say)
    server = loaded.server
    agree(folder, recipe, _inputs(server))
    save_class_names(folder, server.classes)
    columns = _columns(server, folder, observer, say, engine_of, apart=apart)
    best = columns["federated"].shared or Shared()
    extra = {} if recipe.writes else over_all_rows(recipe, columns)
    extra |= preference_numbers(recipe, columns) if recipe.prefers else {}
    extra |= not_scored(columns, len(roster))
    if recipe.writes:
        extra |= safety(recipe, folder, loaded.foundation, loaded.tokenizer, server.start, columns, say)
    extra |= personal_numbers(recipe, columns)
    save_result(folder, recipe, best, server.model, loaded.foundation, loaded.tokenizer, server.classes)
    events = read_trace(folder.path)
    training = trained(lambda _: server, columns, events)
    return TaskResult(
        columns=columns,
        clients=roster.names,
        extra=extra,
        validators=len(validators_of(server)),
        counts=tuple(_counts(roster)),
        training=training,
        compute=compute_of(recipe, loaded.foundation, server.start.trainable, columns, training, events),
    )


def _no_rows() -> LocalEngine:
    raise LichenError("this process has no rows", where="engine.name", fix="use spawned")


def _nodes(recipe: Recipe, folder: RunFolder) -> Nodes:
    """Nodes that open the recipe's data, each all of it."""

    def engine(
        store: ClientStore, stack: ExitStack, start: Shared | None, absent: frozenset[int] = frozenset()
    ) -> Engine:
        there = partial(without_absent, absent=absent)
        return recipe_engine(recipe, folder, store, stack, local=_no_rows, start=start, around=there)

    with ExitStack() as stack:
        roster = enrol(engine(ClientStore(folder.path / NO_STATE), stack, None))
    absent = absent_of(recipe, roster.names)
    return roster, (), lambda store, stack, start: engine(store, stack, start, absent), Cards(), False


def _site_nodes(recipe: Recipe, folder: RunFolder, sites: SiteEngines, say: Callable[[str], None]) -> Nodes:
    """Nodes that each have the rows of one site."""
    federation = sites.enrol(recipe, folder.path, say)
    register(folder.path, federation.fingerprints)
    absent = absent_of(recipe, federation.roster.names)

    def engine(store: ClientStore, stack: ExitStack, start: Shared | None) -> Engine:
        agreed = agreed_name(recipe, start)
        there = sites.engine(recipe, federation, store.folder, stack, agreed=agreed)
        return clocked(recipe, without_absent(there, absent))

    return federation.roster, federation.labels, engine, federation.cards, federation.signed


def _columns(
    server: ServerSide,
    folder: RunFolder,
    observer: EventObserver,
    say: Callable[[str], None],
    engine_of: EngineOf,
    *,
    apart: bool,
) -> dict[str, Column]:
    recipe, summed = server.recipe, sums_scores(server.recipe)
    columns: dict[str, Column] = {}
    with ExitStack() as stack:
        works = works_of(server)

        def engine(store: ClientStore) -> Engine:
            return unmasking(recipe, engine_of(store, stack, server.start), works)

        if "base" in recipe.compare.baselines and recipe.writes:
            say("the nodes score the foundation model as it is")
            nodes = engine(ClientStore(folder.path / NO_STATE))
            metrics = folder.tree("base", partial(scored, server, nodes, server.start, summed=summed))
            columns["base"] = column_of(recipe, metrics, len(server.roster), summed=summed)
        scores: Scores = "summed" if summed else "each" if recipe.privacy is None else "none"
        columns["federated"] = federated_column(server, folder, observer, engine, scores=scores, own_keys=apart)
        columns |= personal_column(server, folder, observer, engine, columns["federated"])
        columns |= alone_columns(server, folder, observer, engine)
        columns |= chosen_column(server, folder, columns, lambda: engine(ClientStore(folder.path / NO_STATE)))
    return columns


def _inputs(server: ServerSide) -> Inputs:
    """What the run is made from, as far as a server can know it."""
    roster = server.roster
    model = hashlib.sha256(f"{server.model.base} {digest(server.start.flat())}".encode()).hexdigest()
    return Inputs(rows=sum(sum(roster.rows(part)) for part in PARTS), data=roster.digest(), model=model)


def _counts(roster: Roster) -> list[dict[str, int | None]]:
    return [{**{part: member.rows.get(part, 0) for part in PARTS}, "cut": None} for member in roster]
