"""The tables of ``preferred.md``: how models of a comparison of preferences rank, what they say, and what they forget.

``python benchmarks/preferred.py --collect NAME FOLDER`` reads the runs of a ``lichen compare NAME`` and keeps their
numbers in ``results/NAME/columns.json``, beside those of runs that the folder lacks. ``python benchmarks/preferred.py
ranks NAME`` prints how each column ranks good above bad rows, ``texts NAME`` what became of good rows and of general
text, ``rows NAME`` the good and bad rows of each part, which ``count NAME`` counts. No table needs torch.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

from collected import run_tables
from tables import spread

from lichen.present.units import seconds_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
COLUMNS = ("federated", "alone", "pooled")
PARTS = ("train", "valid", "test")
OVER_ALL = ("preference", "preference.low", "preference.high", "likelihood", "perplexity", "length")

Cell = dict[str, Any]


def collect(name: str, folder: Path) -> None:
    """Keep the numbers of every seed and method of a comparison's folder, beside what was kept of others."""
    out, cells = RESULTS / name / "columns.json", read(name)
    for file in sorted(folder.glob("*/seed-*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        with open(file.parent / "clients.csv", newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        extra, columns = summary["extra"], {}
        for column in ("base", *COLUMNS):
            score = summary["columns"][column]
            if f"{column}.preference" in extra:
                numbers = {key: extra.get(f"{column}.{key}") for key in OVER_ALL}
                scored = sum(bool(row.get(column)) for row in rows)
                columns[column] = {**numbers, "people": score and score["mean"], "scored": scored}
        cells.setdefault(file.parent.parent.name.rpartition("-")[0], {})[str(summary["seed"])] = {
            "columns": columns,
            "length": extra.get("length.chosen"),
            "before": extra.get("forgotten.before"),
            "after": extra.get("forgotten.after"),
            "clients": summary["clients"],
            "rows": {part: sum(int(row[part]) for row in rows) for part in PARTS},
            "seconds": summary["seconds"],
        }
    cells = {method: dict(sorted(cells[method].items())) for method in sorted(cells)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, dict[str, Cell]]:
    """What was kept of a comparison, by method and seed; nothing before the first run is collected."""
    file = RESULTS / name / "columns.json"
    found: dict[str, dict[str, Cell]] = json.loads(file.read_text("utf-8"))["cells"] if file.exists() else {}
    return found


def models(name: str) -> dict[str, dict[str, Cell]]:
    """``{model: {seed: its column's numbers}}``: the bare model once, and each method's columns."""
    found: dict[str, dict[str, Cell]] = {}
    for method, seeds in read(name).items():
        for seed, cell in seeds.items():
            for column, numbers in cell["columns"].items():
                word = method if column == "federated" else f"{method}, {column}"
                found.setdefault("base" if column == "base" else word, {})[seed] = numbers
    order = [f"{method}{rest}" for method in read(name) for rest in ("", *(f", {one}" for one in COLUMNS[1:]))]
    return {model: found[model] for model in ("base", *order) if model in found}


def show_ranks(name: str) -> None:
    """A row a model: the area over all rows by seed, with 95 % over people drawn anew, and its means."""
    print("| model | seeds | preference over all rows, by seed (95 %) | mean | mean over people | likelihood |")
    print("|---|---:|---:|---:|---:|---:|")
    for model, seeds in models(name).items():
        cells = list(seeds.values())
        each = [
            f"{one['preference']:.3f} ({one['preference.low']:.3f} to {one['preference.high']:.3f})"
            for one in cells
            if one["preference"] is not None
        ]
        means = [spread([one[key] for one in cells], ".3f") for key in ("preference", "people", "likelihood")]
        print(f"| {' | '.join([model, str(len(cells)), ', '.join(each), *means])} |")


def show_texts(name: str) -> None:
    """A row a model: perplexity of good rows, the length of what it ranks above, general text before and after."""
    kept = read(name)
    print("| model | seeds | perplexity of good rows | tokens of what it prefers | general text | a whole run |")
    print("|---|---:|---:|---:|---:|---:|")
    for model, seeds in models(name).items():
        cells, runs = list(seeds.values()), list(kept.get(model, {}).values())
        general = [spread([run[when] for run in runs], ".2f") for when in ("before", "after")]
        texts = [
            spread([one["perplexity"] for one in cells], ".2f"),
            spread([one["length"] for one in cells], ".1f"),
            " → ".join(general) if all(general) else "",
            seconds_text(min(run["seconds"] for run in runs)) if runs else "",
        ]
        print(f"| {' | '.join([model, str(len(cells)), *texts])} |")


def count(name: str) -> None:
    """Keep how many good and bad rows each person has in each part, of the comparison's rows; nothing is trained."""
    from lichen.recipes.comparison import read_comparison
    from lichen.recipes.rows.partition import part
    from lichen.recipes.rows.preferences import goods_of
    from lichen.recipes.rows.prepare import gather_all

    comparison = read_comparison([name])
    recipe = next(method.recipe for method in comparison.methods if method.recipe.preference.kind == "kto")
    found: dict[str, Any] = {"bad_weight": recipe.preference.bad_weight, "seeds": {}}
    for seed in comparison.seeds:
        own = recipe.model_copy(update={"seed": seed})
        people = part(own, gather_all(own).records).clients_data
        found["seeds"][str(seed)] = {
            which: [[int((goods_of(own, getattr(one, which)) == value).sum()) for value in (1, 0)] for one in people]
            for which in PARTS
        }
    out = RESULTS / name / "rows.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found) + "\n", encoding="utf-8")


def show_rows(name: str) -> None:
    """A row a seed: good and bad rows in each part, who has no bad one to be tested on, and how they weigh."""
    found = json.loads((RESULTS / name / "rows.json").read_text("utf-8"))
    print("| seed | to train on | to choose by | to test | people without a bad test turn | good weigh, by bad |")
    print("|---|---:|---:|---:|---:|---:|")
    for seed, parts in found["seeds"].items():
        sums = [[sum(one[value] for one in parts[which]) for value in (0, 1)] for which in PARTS]
        none = sum(bad == 0 for _, bad in parts["test"])
        texts = [*(f"{good} + {bad}" for good, bad in sums), f"{none} of {len(parts['test'])}"]
        print(f"| {' | '.join([seed, *texts, format(sums[0][0] / (found['bad_weight'] * sums[0][1]), '.2f')])} |")


TABLES = {"ranks": show_ranks, "texts": show_texts, "rows": show_rows, "count": count}

if __name__ == "__main__":
    run_tables(sys.argv[1:], __doc__, collect=collect, tables=TABLES)
