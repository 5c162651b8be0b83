"""A finished column of a result, and the engine that computes one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lichen.core.collecting.admission import Admission
from lichen.core.contracts.engine import Engine
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.block_size import AutoBlockSize
from lichen.engines.clock import ClockEngine, Delays
from lichen.engines.distributed import DistributedEngine
from lichen.engines.kinds import EngineSettings
from lichen.engines.local import LocalEngine
from lichen.engines.ranks import Ranks
from lichen.engines.spawned import children_of
from lichen.recipes.assemble.experiment import Experiment, values_N
from lichen.recipes.assemble.parts import client_tasks, works_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.clients import Auxiliary
from lichen.recipes.assemble.sides.limits import limits_of
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.sides.summed_scores import SummedScores, read_scores
from lichen.recipes.schema.recipe import Recipe
from lichen.transforms.delta import snapshot_name

__all__ = [
    "NOBODY",
    "Column",
    "admission_of",
    "agreed_name",
    "block_size_of",
    "clocked",
    "column_of",
    "local_engine",
    "over_ranks",
    "recipe_engine",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A finished column.

    Attributes:
        value_N: The metric of every client on test rows; of nobody where no client tells its own.
        metrics: All the sums behind it, ``(N, ...)``; where no client tells its own, ``(1, ...)`` over all.
        summed: What is known of all clients together where no client tells its own.
        lr: The chosen learning rate; None where nothing was trained.
        shared: What was scored; empty for ``alone``.
        best_round: The round kept.
        unrepaired: What it was before the server's repair; None where there is none.
        personal: The clients' own models of the round kept; None where they trained none in the rounds.
        valid: Sums over each client's validation rows, ``(N, ...)``; None where nobody is to choose by them.
        choices: How many clients have taken which column, where each takes the best.
        others: Sums over rows of other clients, ``(N, ...)``; None where they are not asked for.
    """

    value_N: Tensor
    metrics: Tree
    summed: SummedScores | None = None
    lr: float | None = None
    shared: Shared | None = None
    best_round: int = -1
    unrepaired: Column | None = None
    personal: Column | None = None
    valid: Tree | None = None
    others: Tree | None = None
    choices: Mapping[str, int] = field(default_factory=dict)


NOBODY = torch.empty(0, dtype=torch.float64)
"""Scores where no client tells its own."""


def column_of(recipe: Recipe, metrics: Tree, clients: int, *, summed: bool) -> Column:
    """The column of sums over test rows: of each of so many clients, or of all together."""
    if summed:
        return Column(value_N=NOBODY, metrics=metrics, summed=read_scores(recipe, metrics, clients))
    return Column(value_N=values_N(recipe, metrics), metrics=metrics)


def local_engine(experiment: Experiment, store: ClientStore) -> LocalEngine:
    """This process, with everything a node of the recipe can be asked."""
    recipe = experiment.recipe
    return LocalEngine(
        client_tasks(experiment),
        store,
        base=experiment.model.base,
        block_size=block_size_of(recipe, store),
        device=recipe.model.device,
    )


def admission_of(server: ServerSide, auxiliary: Auxiliary = Auxiliary()) -> Admission:  # noqa: B008
    """What counts of the clients' messages: what their works declare, as far as the roster lets them.

    Args:
        server: The server's side.
        auxiliary: What clients learn from beside, where it is known here.
    """
    return Admission(works=works_of(server, auxiliary), limits=limits_of(server))


def block_size_of(recipe: Recipe, store: ClientStore) -> int | AutoBlockSize:
    """The recipe's clients side by side, or what finds it and keeps it beside the private state."""
    engine = recipe.engine
    if engine.clients_per_block is not None:
        return engine.clients_per_block
    may = engine.gradient_checkpointing is None
    return AutoBlockSize(store.folder.parent / "blocks.json", device=recipe.model.device, may_checkpoint=may)


def over_ranks(ranks: Ranks, local: LocalEngine) -> Engine:
    """The engine over all ranks whose part this process's is; itself where there is one."""
    return local if ranks.size == 1 else DistributedEngine(local, ranks)


def recipe_engine(
    recipe: Recipe,
    folder: RunFolder,
    store: ClientStore,
    stack: ExitStack,
    *,
    local: Callable[[], LocalEngine],
    start: Shared | None = None,
    around: Callable[[Engine], Engine] = lambda engine: engine,
) -> Engine:
    """The engine that a recipe names, open until the stack is closed.

    Args:
        recipe: The recipe.
        folder: The run folder, whose recipe nodes open for themselves.
        store: Private state of the clients.
        stack: Closes the engine.
        local: Makes the engine of this process.
        start: The tensors that all begin from; None: no job has any.
        around: What stands between it and its clock.
    """
    command = (
        *(sys.executable, "-m", "lichen", "node"),
        *("--recipe", str(folder.path / "recipe.yaml"), "--state", str(folder.path / "state")),
    )
    kind, nodes = recipe.engine_kind, recipe.engine.nodes if recipe.pipeline is None else recipe.pipeline.hosts
    settings = EngineSettings(
        local=local,
        ranks=folder.ranks,
        command=command,
        nodes=nodes,
        children=folder.children(lambda: children_of(command, nodes)) if recipe.engine_kind.nodes else None,
        state=store.folder.relative_to(folder.path / "state").as_posix() if kind.nodes else "",
        agreed=agreed_name(recipe, start),
    )
    return clocked(recipe, around(stack.enter_context(kind.make(settings))))


def agreed_name(recipe: Recipe, start: Shared | None) -> str:
    """Digest of the tensors that all begin from, where changes alone are sent down; else empty."""
    return snapshot_name(start) if recipe.wire.down and start is not None and not recipe.starts_at_server else ""


def clocked(recipe: Recipe, engine: Engine) -> Engine:
    """The engine, its clients' training on the recipe's clock where it has one."""
    clock = recipe.engine.clock
    if clock is None:
        return engine
    return ClockEngine(
        engine,
        Delays(**clock.model_dump()),
        seed=derive(recipe.seed, "clock"),
        timed=lambda job: job.work.startswith("train "),
    )
