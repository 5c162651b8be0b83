"""Opens a finished run's rows again: what a model in fewer bits is held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lichen.data.batches.shards import Shard
from lichen.present.clients import read_clients
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.schema.read import recipe_of

__all__ = ["open_rows"]


def open_rows(folder: Path, client: str | None) -> tuple[LoadedExperiment, Sequence[Shard]]:
    """``(what the run was made from, each client's validation rows)``.

    Args:
        folder: The run.
        client: Whose rows alone; None for all clients.

    Raises:
        LichenError: if the data are not those of the run.
    """
    loaded = open_recipe(recipe_of(folder))
    require_same(folder, loaded.experiment.recipe, inputs_of(loaded))
    valid = loaded.experiment.clients.valid
    if client is None:
        return loaded, valid
    return loaded, [valid[[row["client"] for row in read_clients(folder)].index(client)]]
