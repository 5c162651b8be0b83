"""What comes out of the recipes that come with Lichen: the numbers of gallery.md.

A cell is a recipe with the settings and the seed of its page; its summary is kept in ``results/gallery``, and a cell
whose recipe has not changed is not run again. ``python benchmarks/gallery.py --cells`` runs what is missing,
``--cells digits chat-demo`` only those; without ``--cells`` the sections are printed from what was kept, with ``--show
digits`` only that recipe's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from lichen.present.column_names import column_title
from lichen.present.units import bytes_text, seconds_text

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
    "reviews-lora": ("reviews-lora", ()),
    "sotu-diloco": ("sotu-diloco", ()),
    "chat-lora": (
        "chat-lora",
        (
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
    import lichen
    from lichen.recipes.schema.read import recipe_sha256

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


ACCURACY = "accuracy, all rows"


def number(value: float | str | None, metric: str = "") -> str:
    """Three decimals of a share, four digits of anything else."""
    if not isinstance(value, float):
        return "-"
    return f"{value:.4g}" if metric == "perplexity" else f"{value:.3f}"


def told(kept: Sequence[dict[str, Any]]) -> str:
    """The columns of a recipe's runs as Markdown, then what else they tell; several differ in their seeds alone."""
    first = kept[0]
    metric, versions = first["metric"], {run["versions"].get("transformers", "-") for run in kept}
    names = [*(name for name, score in first["columns"].items() if score), *first["extra_columns"]]
    scored = any(f"{name}.accuracy" in first["extra"] for name in names) and metric != "accuracy"
    worst = any(_score(first, name)["worst_decile"] is not None for name in names)
    seeds = [f"seed {run['seed']}" for run in kept]
    heads = [*(["mean"] if len(kept) == 1 else seeds), *(["mean ± deviation"] if len(kept) > 1 else [])]
    heads += [*(["worst decile"] if worst and len(kept) == 1 else []), *([ACCURACY] if scored else [])]
    lines = [
        f"| {metric.replace('macro_f1', 'macro F1')} | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for name in names:
        means = [_score(run, name)["mean"] for run in kept]
        cells = [number(value, metric) for value in means]
        if len(kept) > 1:
            cells.append(f"{number(mean(means), metric)} ± {number(stdev(means), metric)}")
        elif worst:
            cells.append(number(_score(first, name)["worst_decile"], metric))
        if scored:
            cells.append(number(first["extra"].get(f"{name}.accuracy")))
        title = column_title(name)
        lines.append(f"| {f'**{title}**' if name == 'federated' else title} | " + " | ".join(cells) + " |")
    lines.append("")
    gaining = [f"{100 * run['share_gaining']:.0f} %" for run in kept if run["share_gaining"] is not None]
    shares = f"{_each(gaining)} gain over training alone; " if gaining else ""
    up, down = (_each([bytes_text(run[key]) for run in kept]) for key in ("bytes_up", "bytes_down"))
    seconds = _each([seconds_text(run["seconds"]) for run in kept])
    lines.append(f"{first['clients']} clients; {shares}{up} up, {down} down; {seconds}; transformers "
                 f"{', '.join(sorted(versions))}.")  # fmt: skip
    rates = {name: value for name, value in first["extra"].items() if name.startswith("lr.") and value is not None}
    if rates and len(kept) == 1:
        lines.append("Learning rates: " + ", ".join(f"{column_title(n[3:])} {r:g}" for n, r in rates.items()) + ".")
    return "\n".join(lines)


def _each(values: Sequence[str]) -> str:
    """Every run's value, or the one that all have."""
    return ", ".join(values if len(set(values)) > 1 else values[:1])


def _score(run: dict[str, Any], column: str) -> dict[str, Any]:
    return dict({**run["columns"], **run["extra_columns"]}[column])


def section(recipe: str) -> str:
    """What was kept of a recipe's cells."""
    files = [RESULTS / f"{name}.json" for name, (of, _) in CELLS.items() if of == recipe]
    kept = [json.loads(file.read_text()) for file in files if file.exists()]
    return told(kept) if kept else "Not run."


def main() -> None:
    """Run cells, or print what was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="*", metavar="CELL", help="run what is missing, or only these")
    parser.add_argument("--show", metavar="RECIPE", help="print what was kept of this recipe")
    asked = parser.parse_args()
    if asked.show:
        print(section(asked.show))
    elif asked.cells is not None:
        for name in asked.cells or CELLS:
            run_cell(name)
    else:
        for recipe in dict.fromkeys(recipe for recipe, _ in CELLS.values()):
            print(f"## {recipe}\n\n{section(recipe)}\n")


if __name__ == "__main__":
    main()
