"""The two default workloads: the rows, the clients and the numbers every contestant gets.

1. ``chat``: SmolLM2-135M, LoRA r = 8 on q and v, 16 real chat senders, 4 AdamW steps of 4 rows of at
   most 64 tokens.
2. ``reviews``: MiniLM-L6 with a classification head, LoRA r = 8 on query and value, 16 products, 4
   AdamW steps of 8 rows.

``python benchmarks/workload.py chat FOLDER`` writes what a peer in another environment needs:
``tokens.npy`` (int32, all rows one after another), ``labels.npy`` (int32 with -100, or the class of
every row), ``row_offsets.npy`` and ``client_offsets.npy`` (int64), ``order.npy`` (clients, steps, rows
of a batch: row numbers within the client, so that everyone trains on the same rows), and
``workload.json`` with the model's folder and the settings.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lichen.data.batches.rows import TextShard
from lichen.data.sources.catalog import resolve_model
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe

__all__ = ["NAMES", "Workload", "export", "load"]

NAMES = ("chat", "reviews")
CLIENTS, STEPS, RANK, ALPHA, LR, CLIP = 16, 4, 8, 16.0, 1e-3, 1.0
_CHANGES: dict[str, tuple[str, ...]] = {
    "chat": ("data.form=plain", "data.max_length=64", "data.min_rows=100", "federation.batch_size=4"),
    "reviews": ("data.max_length=128", "federation.batch_size=8"),
}
_GALLERY = {"chat": "chat-demo", "reviews": "reviews-lora"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One workload.

    Attributes:
        name: ``chat`` or ``reviews``.
        recipe: As a recipe.
        loaded: Its model and shards.
        order: ``(clients, steps, batch)`` row numbers within each client.
    """

    name: str
    recipe: Recipe
    loaded: LoadedExperiment
    order: np.ndarray

    @property
    def tokens(self) -> int:
        """Real tokens trained on in a round."""
        return sum(
            len(shard.input_ids[int(i)])
            for shard, rows in zip(self.loaded.experiment.clients.train, self.order, strict=True)
            for i in rows.ravel()
            if isinstance(shard, TextShard)
        )


def load(name: str, *changes: str) -> Workload:
    """The workload, with changes to its recipe such as ``model.dtype=bfloat16``."""
    recipe = read_recipe(
        _GALLERY[name],
        (
            f"data.max_clients={CLIENTS}",
            f"federation.local_steps={STEPS}",
            f"federation.rounds={2}",
            f"model.adapter.rank={RANK}",
            f"model.adapter.alpha={ALPHA}",
            f"optimizer.lr=[{LR}]",
            f"optimizer.clip={CLIP}",
            "federation.aggregate=mean",
            "federation.clients_per_round=null",
            *_CHANGES[name],
            *changes,
        ),
    )
    loaded = open_recipe(recipe)
    fed = recipe.federation
    source: Any = loaded.experiment.training(
        loaded.experiment.clients.train, batch=fed.batch_size, steps=fed.local_steps
    )
    order = np.stack(
        [np.stack([next(rows) for _ in range(fed.local_steps)]) for rows in map(_rows(source), range(CLIENTS))]
    )
    return Workload(name=name, recipe=recipe, loaded=loaded, order=order)


def _rows(source: Any) -> Any:
    return lambda client: source.rows(client, 0)


def export(workload: Workload, folder: Path) -> None:
    """Write the workload for those who cannot import lichen."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [shard for shard in workload.loaded.experiment.clients.train if isinstance(shard, TextShard)]
    rows = [row for shard in shards for row in shard.input_ids]
    labels = [np.asarray(label) for shard in shards for label in shard.labels]
    lm = shards[0].kind == "lm"
    arrays = {
        "tokens": np.concatenate(rows).astype(np.int32),
        "labels": np.concatenate(labels).astype(np.int32) if lm else np.array(labels, np.int32),
        "row_offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
        "client_offsets": np.cumsum([0, *(shard.size for shard in shards)], dtype=np.int64),
        "order": workload.order,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    fed, adapter = workload.recipe.federation, workload.recipe.model.adapter
    said = {
        "name": workload.name,
        "model": str(resolve_model(str(workload.recipe.model.name))),
        "pad": workload.loaded.experiment.server.pad,
        "classes": len(workload.loaded.classes),
        "targets": list(adapter.target_modules),
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "lr": LR,
        "clip": CLIP,
        "steps": fed.local_steps,
        "batch": fed.batch_size,
        "tokens": workload.tokens,
    }
    (folder / "workload.json").write_text(json.dumps(said, indent=2) + "\n")


def main() -> None:
    """Write one workload into a folder."""
    if len(sys.argv) != 3 or sys.argv[1] not in NAMES:
        raise SystemExit(f"use: python benchmarks/workload.py {'|'.join(NAMES)} FOLDER")
    export(load(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
