"""What runs of a comparison share: the bare model's scores and a frozen encoder's features, linked from run to run.

They depend on a part of the recipe only. A digest over that part names the folder where they lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lichen.core import private
from lichen.core.files.durable import write_atomic
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.renamed_keys import with_old_names

__all__ = ["SHARED", "former_shared_key", "link_shared", "shared_key"]

SHARED = ("base.safetensors", "base.*.safetensors", "forgotten.before.safetensors", "features/*.safetensors")
"""Of a run's scores, those that :func:`shared_key` determines."""


def shared_key(recipe: Recipe) -> str:
    """Digest of all that the bare model's scores and an encoder's features depend on (16 hex digits)."""
    return _digest(_depended_on(recipe))


def former_shared_key(recipe: Recipe) -> str:
    """What :func:`shared_key` was before keys of recipes were renamed."""
    return _digest(with_old_names(_depended_on(recipe)))


def _depended_on(recipe: Recipe) -> dict[str, Any]:
    whole, compare = recipe.model_dump(mode="json"), recipe.compare
    model = dict(whole["model"])
    adapter, facts = dict(model["adapter"]), recipe.model.adapter.facts
    if facts.low_rank and recipe.model.adapter.init_from is None:
        # B begins at zero: the bare model gives the same, whatever these are.
        adapter = {key: value for key, value in adapter.items() if key not in facts.keys}
    return {
        "task": whole["task"],
        "seed": whole["seed"],
        "model": {**model, "adapter": adapter},
        "data": whole["data"],
        "teacher": whole["teacher"],
        "forgotten": [compare.retention_text, compare.retention_rows],
        "packing": whole["engine"]["packing"],
        **_crossing(recipe),
    }


def _crossing(recipe: Recipe) -> dict[str, Any]:
    """Where and how rows that are scored cross coded or noisy; nothing where they cross as they are."""
    split, hosts, found = recipe.split, recipe.pipeline, dict[str, Any]()
    if split is not None and (split.code or split.noise):
        found["split"] = split.model_dump(mode="json", include={"client", "code", "noise"})
        found["memory"] = recipe.federation.memory
    if hosts is not None and hosts.code:
        found["pipeline"] = hosts.model_dump(mode="json", include={"hosts", "parts", "code"})
    return found


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def link_shared(source: Path, target: Path) -> None:
    """Let a folder have the shared files of another; these are replaced and never rewritten, so links are safe."""
    for pattern in SHARED:
        for file in source.glob(pattern):
            there = target / file.relative_to(source)
            if there.exists():
                continue
            private.make_folders(there.parent)
            try:
                os.link(file, there)
            except OSError:
                write_atomic(there, file.read_bytes())
