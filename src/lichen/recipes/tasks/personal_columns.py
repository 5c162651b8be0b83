"""The column ``personal``: every client scored with a model of its own, in the place of the one that all share.

Where clients train their own tensors in the rounds, the models are those of the round whose shared tensors were kept.
Fine-tuning begins where the rounds have ended: each client goes on from the kept tensors by itself, and of several
numbers of steps it takes the one that is best on its validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lichen.algorithms.alone import Alone
from lichen.algorithms.finetune import Finetune
from lichen.algorithms.scores import MISSING
from lichen.core.contracts.engine import Engine
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.present.column_names import column_title
from lichen.recipes.assemble.column import Column, admission_of
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.personal import stages_of
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.learning import Engines, EventObserver, go_rounds, observing, own_column, scored

__all__ = ["chosen_column", "personal_column", "personal_numbers"]

NAME, CHOSEN = "personal", "chosen"

CANDIDATES = (NAME, "federated", "alone", "alone_best", "base")
"""What a client may choose from; of equal ones the first."""


def personal_column(
    server: ServerSide, folder: RunFolder, observer: EventObserver, engines: Engines, federated: Column
) -> dict[str, Column]:
    """The column by its name; none where the recipe has no section ``personal``, or the shared model no scores.

    Args:
        server: The server's side.
        folder: The run folder.
        observer: Sees every stage.
        engines: Make an engine whose clients keep their private state in a store.
        federated: The finished column of the shared model.

    Raises:
        LichenError: if a client could not say its score, or was not there.
    """
    if federated.personal is not None:
        return {NAME: federated.personal}
    stages, lr = stages_of(server.recipe), federated.lr
    if not stages or lr is None or not len(federated.value_N):
        return {}
    engine = engines(ClientStore(folder.clients(NAME, lr_name(lr)), listed=True))
    admission, shared, count = admission_of(server), federated.shared or Shared(), len(stages)
    config = server.recipe.personal
    scale = 1.0 if config is None else config.lr_scale
    alone = Alone(
        clients=len(server.roster),
        rounds=count,
        valid="personal.valid",
        lr_scale=lambda stage: scale,
        base=server.model.base,
        admission=admission,
    )
    go_rounds(
        server,
        Finetune(
            alone=alone,
            works=tuple(f"personal {lr_name(lr)}{at}" for at in stages),
            steps=tuple(stages.values()),
        ),
        engine,
        count,
        folder.checkpoint(NAME, lr_name(lr)),
        observing(observer, NAME, lr, count),
        folder.ranks.ask_first,
        folder.save,
        initial=shared,
        stop=lambda state: False,
    )
    ask = partial(scored, server, engine, shared, version=2 * count, admission=admission)
    return {NAME: replace(own_column(server, folder, NAME, ask), lr=lr)}


def chosen_column(
    server: ServerSide, folder: RunFolder, columns: Mapping[str, Column], engine: Callable[[], Engine]
) -> dict[str, Column]:
    """The column in which each client takes what is best on its validation rows, where the recipe has it.

    A client without validation rows takes its own model. Nobody ends below what it had to choose from, but by how far
    validation rows differ from test rows.

    Args:
        server: The server's side.
        folder: The run folder.
        columns: The finished columns; those of :data:`CANDIDATES` among them are what clients choose from.
        engine: Asks clients about tensors that all share.
    """
    config, own = server.recipe.personal, columns.get(NAME)
    if config is None or not config.choose or own is None:
        return {}

    def valid(name: str) -> Tree:
        shared = {"base": server.start, "federated": columns["federated"].shared}
        if name not in shared:
            return columns[name].valid or {}
        ask = partial(scored, server, engine(), shared[name] or Shared(), work="choose.shared")
        return folder.tree(f"{name}.valid", ask)

    names = [name for name in CANDIDATES if name in columns]
    loss_KN = torch.stack([_mean_losses(valid(name)) for name in names])
    choice_N = loss_KN.argmin(0)
    everyone = range(len(choice_N))
    metrics = {
        key: torch.stack([columns[names[choice_N[n]]].metrics[key][n] for n in everyone])
        for key in own.metrics
        if key != MISSING
    }
    counts = {name: int((choice_N == at).sum()) for at, name in enumerate(names)}
    return {CHOSEN: Column(value_N=values_N(server.recipe, metrics), metrics=metrics, choices=counts)}


def _mean_losses(sums: Tree) -> Tensor:
    """The mean loss of each client; infinite where it has none, or is none."""
    loss_N = sums["loss_sum"] / sums["count"].clamp(min=1)
    return torch.where((sums["count"] > 0) & loss_N.isfinite(), loss_N, torch.inf)


def personal_numbers(recipe: Recipe, columns: Mapping[str, Column]) -> dict[str, float | str | None]:
    """What a summary says beside the columns: what clients chose, and how models do on rows of other clients.

    Args:
        recipe: The recipe.
        columns: The finished columns.
    """
    found: dict[str, float | str | None] = {}
    if CHOSEN in columns:
        choices = columns[CHOSEN].choices.items()
        found["chosen from"] = ", ".join(f"{column_title(name)} {count}" for name, count in choices)
    for name in ("federated", NAME):
        sums = columns[name].others if name in columns else None
        if sums is not None:
            value = float(values_N(recipe, sums).nanmean())
            found[f"others.{name}"] = None if math.isnan(value) else value
    return found
