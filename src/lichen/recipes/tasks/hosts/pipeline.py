"""Runs a recipe with a section ``pipeline``: one model over hosts, none of which has the whole.

The process that runs the recipe reads the clients' rows, sends tokens to the first host and labels to the last, and
keeps the adapter and the optimizer's state of all hosts, of which each round ends in a file. It has no weight of the
model. Columns are ``base`` and ``federated``, scored over the hosts like everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

from lichen.algorithms.hosts.pipeline import Pipeline
from lichen.core.contracts.engine import Engine
from lichen.core.store import ClientStore
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.content_digest import records_digest, shards_digest
from lichen.engines.local import LocalEngine
from lichen.present.trace import read_trace
from lichen.recipes.artifacts.inputs import Inputs, agree
from lichen.recipes.assemble.chat_template import keep_template
from lichen.recipes.assemble.column import Column, recipe_engine
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.pieces.hosts import Hosts
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.sides.clients import ClientSide
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.rows.client_counts import counts_of, shared_test
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.adapt import save_result
from lichen.recipes.tasks.coverage import trained
from lichen.recipes.tasks.hosts.opening import each_once, open_hosts
from lichen.recipes.tasks.learning import EventObserver, go_rounds, observing
from lichen.recipes.tasks.outcome import TaskResult

__all__ = ["run_pipeline"]


def run_pipeline(recipe: Recipe, folder: RunFolder, observer: EventObserver, say: Callable[[str], None]) -> TaskResult:
    """Run a recipe whose model lies in pieces.

    Args:
        recipe: The recipe.
        folder: The run folder.
        observer: Sees every round.
        say: Called with lines of progress.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    setup = open_hosts(recipe, say)
    hosts, pipeline, server, rows = setup.hosts, setup.pipeline, setup.server, setup.rows
    keep_template(recipe, setup.tokenizer, folder.path)
    names = tuple(client_data.name for client_data in setup.clients_data)
    agree(folder, recipe, _inputs(hosts, setup.gathered.records, rows))
    save_roster(folder, server.roster, setup.gathered.cards)
    columns: dict[str, Column] = {}
    with ExitStack() as stack:
        engine = _engine(hosts, folder, stack)

        def tested(name: str, shared: Shared) -> Column:
            source = each_once(server, rows.test)
            metrics = folder.tree(name, partial(pipeline.score, engine, shared, source, range(len(names))))
            return Column(value_N=values_N(recipe, metrics), metrics=metrics)

        if "base" in recipe.compare.baselines:
            say("scoring the foundation model as it is")
            columns["base"] = tested("base", hosts.start)
        columns["federated"] = _learned(pipeline, server, engine, folder, observer, tested)
    best = columns["federated"].shared
    assert best is not None
    if folder.ranks.first:
        save_result(folder, recipe, best, cast(Any, hosts), hosts.structure, setup.tokenizer, ())
    events = read_trace(folder.path)
    idle = [e.report.metrics["idle"] for e in events if e.column == "federated"]
    return TaskResult(
        columns=columns,
        clients=names,
        extra={
            "hosts.blocks": ", ".join(map(str, hosts.parts)),
            "hosts.largest_share": max(hosts.shares),
            "hosts.idle": sum(idle) / max(len(idle), 1),
        },
        read=setup.read,
        cards=setup.gathered.cards,
        validators=len(names),
        counts=counts_of(recipe, setup.clients_data, setup.tokenizer),
        training=trained(lambda _: server, columns, events),
        common_test=shared_test(setup.clients_data),
    )


def _inputs(hosts: Hosts, records: Any, rows: ClientSide) -> Inputs:
    about = [hosts.structure.config.to_json_string(), hosts.parts, digest(hosts.start.flat())]
    return Inputs(
        rows=len(records),
        data=records_digest(records),
        model=hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        tokens=shards_digest(rows.train, rows.valid, rows.test),
    )


def _engine(hosts: Hosts, folder: RunFolder, stack: ExitStack) -> Engine:
    """The hosts, in this process or each in one of its own."""
    recipe = hosts.recipe
    store = ClientStore(folder.clients("federated", lr_name(recipe.optimizer.lr[0])), listed=True)

    def local() -> LocalEngine:
        return LocalEngine(hosts.client_tasks(), store, device=recipe.model.device)

    return recipe_engine(recipe, folder, store, stack, local=local)


def _learned(
    pipeline: Pipeline,
    server: ServerSide,
    engine: Engine,
    folder: RunFolder,
    observer: EventObserver,
    tested: Callable[[str, Shared], Column],
) -> Column:
    recipe, lr, name = server.recipe, server.recipe.optimizer.lr[0], "federated"
    state = go_rounds(
        server,
        pipeline,
        engine,
        recipe.federation.rounds,
        folder.checkpoint(name, lr_name(lr)),
        observing(observer, name, lr, recipe.federation.rounds),
        folder.ranks.ask_first,
        folder.save,
        initial=server.start,
    )
    shared, round_number = (state.best, state.best_round) if state.best_round >= 0 else (state.shared, state.round)
    found = tested(name, shared)
    return Column(value_N=found.value_N, metrics=found.metrics, lr=lr, shared=shared, best_round=round_number)
