"""What comes out of the recipes that come with Lichen: the numbers of gallery.md.

A cell is a recipe with the settings and the seed of its page; its summary is kept in ``results/gallery``, and a cell
whose recipe has not changed is not run again. ``python benchmarks/gallery.py --cells`` runs what is missing,
``--cells digits chat-demo`` only those; without ``--cells`` the tables are printed from what was kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lichen
from lichen.recipes.schema.read import recipe_sha256

RESULTS = Path(__file__).parent / "results" / "gallery"
CELLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits": ("digits", ()),
    "digits-unequal-s0": ("digits-unequal", ("seed=0",)),
    "digits-unequal-s1": ("digits-unequal", ("seed=1",)),
    "digits-unequal-s2": ("digits-unequal", ("seed=2",)),
    "reviews-oneshot": ("reviews-oneshot", ()),
    "reviews-few": ("reviews-few", ()),
    "reviews-teacher": ("reviews-teacher", ()),
    "chat-demo": ("chat-demo", ()),
    "reviews-lora": ("reviews-lora", ("model.dtype=bfloat16",)),
    "sotu-diloco": ("sotu-diloco", ()),
    "chat-lora": (
        "chat-lora",
        (
            "model.dtype=bfloat16",
            "federation.rounds=12",
            "federation.clients_per_round=12",
            "federation.valid_every=3",
            "optimizer.grid_rounds=3",
        ),
    ),
}
"""The recipe and its settings by cell; the quick ones first."""


def run_cell(name: str) -> None:
    """Run one cell, unless its summary is kept under the same recipe."""
    recipe_name, settings = CELLS[name]
    recipe = lichen.read_recipe(recipe_name, settings)
    path = RESULTS / f"{name}.json"
    if path.exists() and json.loads(path.read_text())["recipe_sha256"] == recipe_sha256(recipe):
        print(f"{name}: kept")
        return
    with TemporaryDirectory() as folder:
        result = lichen.run(recipe, out=Path(folder) / "run")
        RESULTS.mkdir(parents=True, exist_ok=True)
        shutil.copy(result.folder / "summary.json", path)
    print(f"{name}: done")


def number(value: float | None) -> str:
    """Four digits."""
    return "" if value is None else f"{value:.4g}"


def table(summary: dict[str, Any]) -> str:
    """One run's columns as Markdown."""
    lines = [f"| {summary['metric']} | mean | worst decile | accuracy, all rows |", "|---|---:|---:|---:|"]
    columns = {name: score for name, score in summary["columns"].items() if score} | summary["extra_columns"]
    for name, score in columns.items():
        accuracy = number(summary["extra"].get(f"{name}.accuracy"))
        lines.append(f"| {name} | {number(score['mean'])} | {number(score.get('worst_decile'))} | {accuracy} |")
    gaining = summary["share_gaining"]
    lines.append("")
    lines.append(
        f"{summary['clients']} clients, {'-' if gaining is None else f'{gaining:.0%}'} gain over training alone; "
        f"{summary['bytes_up'] / 1e6:.3g} MB up, {summary['bytes_down'] / 1e6:.3g} MB down; "
        f"{summary['seconds']:.0f} s; transformers {summary['versions'].get('transformers', '?')}."
    )
    return "\n".join(lines)


def main() -> None:
    """Run cells, or print what was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", metavar="CELL", help="run what is missing, or only these")
    asked = parser.parse_args().cells
    if asked is not None:
        for name in asked or CELLS:
            run_cell(name)
        return
    for name in CELLS:
        path = RESULTS / f"{name}.json"
        print(f"## {name}\n")
        print(table(json.loads(path.read_text())) if path.exists() else "not run")
        print()


if __name__ == "__main__":
    main()
