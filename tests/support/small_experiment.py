"""A federation of a few clients with a few numbers each, over a network of a few weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from lichen.core.store import ClientStore
from lichen.data.batches.shards import ArrayShard
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.sides.clients import ClientSide
from lichen.recipes.schema.read import read_recipe

RECIPE: dict[str, Any] = {
    "task": "classify",
    "model": {"student": {"kind": "image-mlp"}},
    "data": {"name": "rows.jsonl"},
    "federation": {"aggregate": "mean", "local_steps": 3, "batch_size": 4},
    "optimizer": {"lr": [0.1]},
}


def experiment(clients: int = 4, *, broken: tuple[int, ...] = ()) -> Experiment:
    """Clients ``broken`` hold infinite numbers, so that their training fails."""
    rng = np.random.default_rng(0)

    def shard(rows: int, bad: bool = False) -> ArrayShard:
        labels = rng.integers(0, 3, rows)
        x = rng.normal(size=(rows, 6)) + 2 * np.eye(3, 6)[labels]
        return ArrayShard(x=np.where(bad, np.inf, x).astype(np.float32), labels=labels)

    model = ImageMLP(6, hidden=(8,), classes=3)
    train = tuple(shard(9 + c, c in broken) for c in range(clients))
    valid, test = (tuple(shard(4 + c) for c in range(clients)) for _ in range(2))
    recipe = read_recipe(RECIPE)
    return Experiment.of(recipe, model, ClientSide(train=train, valid=valid, test=test))


def engine(made: Experiment, folder: Path, *, block: int = 3) -> LocalEngine:
    """The local engine over it."""
    return LocalEngine(client_tasks(made), ClientStore(folder), block_size=block)
