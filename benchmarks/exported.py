"""How far an exported adapter in PEFT is from the run that made it: ``python benchmarks/exported.py RUN...``.

The run's side is the cohort model itself (the client axis, the patch); the other side is
``peft.PeftModel`` over a freshly loaded base, both in float32 whatever the run's precision was (adapters
are float32 always). Prints the largest difference of any logit.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.store import load_tree
from lichen.core.tree import Tree
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.schema.read import read_recipe

TEXTS = ("The dress fits well and I love the colour.", "what are you up to today?", "No.")


def logits(loaded: LoadedExperiment, tree: Tree, inputs: dict[str, Tensor]) -> Tensor:
    """The run's logits, by its own forward pass."""
    fixed = {name: x for name, x in tree.items() if name.startswith("patch.")}
    own = {name: x for name, x in tree.items() if name not in fixed}
    model: Any = loaded.experiment.model
    out: Tensor = model.wrapped.call(trees.broadcast(own, 1), fixed, **inputs).logits
    return out


def largest_difference(folder: Path) -> tuple[float, float]:
    """``(largest logit difference, largest logit)`` over a few texts."""
    recipe = read_recipe(folder / "recipe.yaml", ["model.dtype=float32"])
    loaded = open_recipe(recipe)
    tree, _ = load_tree(folder / "state" / "final.safetensors")
    lone = open_recipe(recipe).foundation
    adapted = peft.PeftModel.from_pretrained(lone, folder / "adapter", autocast_adapter_dtype=False).eval()
    worst = size = 0.0
    with torch.no_grad():
        for text in TEXTS:
            inputs = dict(loaded.tokenizer(text, return_tensors="pt"))
            mine, theirs = logits(loaded, tree, inputs), adapted(**inputs).logits
            worst = max(worst, float((mine - theirs).abs().max()))
            size = max(size, float(mine.abs().max()))
    return worst, size


def main(folders: list[str]) -> None:
    """Print one line a run."""
    for folder in folders:
        worst, size = largest_difference(Path(folder))
        print(f"{folder}: largest logit difference {worst:.2e} (largest logit {size:.1f})")


if __name__ == "__main__":
    main(sys.argv[1:])
