"""Takes one client's statistics off the sums of a one-shot run: what is left is the sum of the others, to the byte."""

from __future__ import annotations

import json
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.private import make_folders
from lichen.core.store import load_tree
from lichen.core.tree import Tree
from lichen.data.batches.shards import ArrayShard
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.oneshot import engine_for, summed
from lichen.server.sums.stored import SUMS, dump_sums, load_sums, minus

__all__ = ["copy_features", "has_sums", "subtract"]

_FEATURES = Path("state") / "scores" / "features"


def has_sums(run: Path) -> bool:
    """Whether a run's sums and features are in its folder; those of earlier versions kept no sums."""
    return (run / "state" / "scores" / f"{SUMS}.safetensors").is_file() and (run / _FEATURES).is_dir()


def copy_features(run: Path, new: Path, client: int) -> None:
    """Let the new folder have the features of all other clients, so that their rows are not encoded again."""
    for file in sorted((run / _FEATURES).glob("*.safetensors")):
        if file.stem.rpartition("-")[2] != str(client):
            make_folders(new / _FEATURES)
            write_atomic(new / _FEATURES / file.name, file.read_bytes())


def subtract(run: Path, recipe: Recipe, folder: RunFolder, client: int, clients: int) -> None:
    """Give the new folder the old sums without a client's.

    Args:
        run: The finished run.
        recipe: Its recipe.
        folder: The new one.
        client: Its place in the roster.
        clients: How many there are.

    Raises:
        LichenError: if the sums or the client's features are missing, or do not belong together.
    """
    file = run / _FEATURES / f"train-{client}.safetensors"
    try:
        rows, _ = load_tree(file)
        x, labels = rows["x"].numpy(), rows["labels"].numpy()
    except (LichenError, KeyError):
        fix = f"make it again: lichen run --resume {run}, or use --how replay"
        raise LichenError("is missing or damaged", where=str(file), fix=fix) from None
    shard = ArrayShard(x=x, labels=labels)
    shards = [shard if at == client else shard.between(0, 0) for at in range(clients)]
    base = str(json.loads((run / "state" / "inputs.json").read_text(encoding="utf-8"))["model"])
    engine, admission = engine_for(recipe, shards, len(class_names(run)), folder, base=base)
    part = summed(recipe, engine, admission, (client,), base=base).total

    def remainder() -> Tree:
        total, up, down = load_sums(load_tree(run / "state" / "scores" / f"{SUMS}.safetensors")[0])
        return dump_sums(minus(total, part), up=up - engine.bytes_up, down=down - engine.bytes_down)

    folder.tree(SUMS, remainder)
