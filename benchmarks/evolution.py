"""Do votes draw what a language model writes towards texts it has never seen?

Reads the runs of ``lichen compare help-reviews`` in which texts were written: by label alone, and by Private
Evolution at three promises of privacy. For each pool and seed it tells the mean distance (of unit vectors of a
sentence encoder) from a real row to the nearest written one of its class, over the private rows that voted and over
the common test set, which nobody voted with, and the score of the student that learned from the pool. The four
pools of a seed stand against the same real rows.

Run it: ``python benchmarks/evolution.py [FOLDER]``; it writes ``results/evolution.json``.

Legend: R real rows, S written texts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch import Tensor

from lichen.data.sources.catalog import fetch_entry
from lichen.data.sources.records import Record
from lichen.data.synthetic.pool import load_pool
from lichen.fm.encoder import LocalEncoder
from lichen.models.loading.load import load_encoder
from lichen.recipes.rows.prepare import gather
from lichen.recipes.rows.public import labelled_of, split_public
from lichen.recipes.schema.read import read_recipe

RESULTS = Path(__file__).resolve().parent / "results"
POOLS = ("prompted", "evolution-inf", "evolution-4", "evolution-1")
LEVEL = "skew-50"


Rows = tuple[Tensor, np.ndarray]
"""Vectors ``(R, H)`` and labels ``(R,)``."""


def embedded(records: Sequence[Record], embed: Callable[[list[str]], Tensor]) -> Rows:
    """The records as vectors of length one."""
    return embed([r.text for r in records]), np.array([str(r.label) for r in records])


def nearest(real: Rows, texts: Rows) -> float:
    """Mean distance of real rows to the nearest text of their class; classes without a text do not count."""
    (x_RH, real_R), (y_SH, texts_S) = real, texts
    found = [
        torch.cdist(x_RH[real_R == label].double(), y_SH[texts_S == label].double()).min(1).values
        for label in sorted(set(real_R) & set(texts_S))
    ]
    return float(torch.cat(found).mean())


def measured(run: Path, embed: Callable[[list[str]], Tensor], real: dict[int, tuple[Rows, Rows]]) -> dict[str, Any]:
    """One finished run's numbers; the real rows of its seed are looked up in ``real``, or put there."""
    recipe = read_recipe(run / "recipe.yaml")
    if recipe.seed not in real:
        clients_data = labelled_of(split_public(recipe, gather(recipe)).clients_data)
        voters = [record for owner in clients_data for record in owner.train]
        real[recipe.seed] = embedded(voters, embed), embedded(clients_data[0].test, embed)
    texts = embedded(load_pool(run / "pool.jsonl").records(), embed)
    summary = json.loads((run / "summary.json").read_text())
    to_voters, to_others = (nearest(rows, texts) for rows in real[recipe.seed])
    return {
        "run": summary["name"],
        "seed": recipe.seed,
        "promise": summary["extra"].get("synthetic.privacy", "no private row has a say"),
        "sigma": summary["extra"].get("synthetic.sigma"),
        "texts": len(texts[1]),
        "to_voters": to_voters,
        "to_others": to_others,
        "macro_f1": summary["columns"]["federated"]["mean"],
    }


def main(folder: str = str(RESULTS / "help-reviews-before")) -> None:
    """Measure every pool and print the table."""
    torch.set_num_threads(1)
    encoder = LocalEncoder(*load_encoder(fetch_entry("minilm-l6")), name="minilm-l6", longest=64)
    found, real = [], dict[int, tuple[Rows, Rows]]()
    for name in POOLS:
        runs = sorted(Path(folder).glob(f"{name}@{LEVEL}-*/seed-*/pool.jsonl"))
        rows = [measured(file.parent, encoder.embed, real) for file in runs if (file.parent / "summary.json").exists()]
        found += rows
    (RESULTS / "evolution.json").write_text(json.dumps(found, indent=1) + "\n")
    tables.evolution()


if __name__ == "__main__":
    main(*sys.argv[1:])
