"""The tables and the picture of ``personal.md``: what each client has of a model of its own.

``python benchmarks/personal.py --collect NAME FOLDER`` reads the runs of a ``lichen compare NAME`` and keeps their
clients' scores, without names, in ``results/NAME/clients.json``, beside those of runs that the folder lacks. ``python
benchmarks/personal.py models NAME`` prints a row a model, ``seeds NAME OTHER`` how far each is from another in every
seed, ``draw NAME OTHER`` the picture.
None of these needs torch.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from collected import run_tables
from tables import spread

from lichen.present.units import bytes_text, seconds_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
COLUMNS = ("base", "alone", "federated", "personal", "chosen")


def collect(name: str, folder: Path) -> None:
    """Keep the scores of every client, seed and method of a comparison's folder, beside what was kept of others."""
    out = RESULTS / name / "clients.json"
    cells: dict[str, dict[str, Any]] = read(name)["cells"] if out.exists() else {}
    metric, higher = "", False
    for file in sorted(folder.glob("*/seed-*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        method = file.parent.parent.name.rpartition("-")[0]
        with open(file.parent / "clients.csv", newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        scores = {column: [float(row[column]) for row in rows if row.get(column)] for column in COLUMNS}
        memory = file.parent.parent / "memory.json"
        held = (json.loads(memory.read_text()) if memory.exists() else None) or {}
        cells.setdefault(method, {})[str(summary["seed"])] = {
            "scores": {column: some for column, some in scores.items() if some},
            "train": [int(row["train"]) for row in rows],
            "others": {k.removeprefix("others."): v for k, v in summary["extra"].items() if k.startswith("others.")},
            "seconds": summary["seconds"],
            "up": summary["bytes_up"],
            "memory": sum(held.values()) or None,
        }
        metric, higher = summary["metric"], summary["higher_is_better"]
    cells = {method: dict(sorted(cells[method].items())) for method in sorted(cells)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"metric": metric, "higher": higher, "cells": cells}, indent=1) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """What was kept of a comparison."""
    found: dict[str, Any] = json.loads((RESULTS / name / "clients.json").read_text(encoding="utf-8"))
    return found


def models(found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """``{model: {seed: its cell with one column of scores}}``; own models are called as their method."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    plain = any("personal" not in cell["scores"] for seeds in found["cells"].values() for cell in seeds.values())
    for method, seeds in found["cells"].items():
        for seed, cell in seeds.items():
            for column, scores in cell["scores"].items():
                base, _, level = method.partition("@")
                at = f"@{level}" if level else ""
                if column in ("base", "alone"):
                    name = f"{column}{at}" if plain or column == "base" else f"{base}, alone{at}"
                elif column == "federated":
                    own = "personal" in cell["scores"]
                    name = method if not own else "" if plain else f"{base}, shared{at}"
                else:
                    name = f"{base}{'' if column == 'personal' else f', {column}'}{at}"
                if name and seed not in out.get(name, {}):
                    out.setdefault(name, {})[seed] = {**cell, "own": scores, "others": cell["others"].get(column)}
    shared = {seed: cell for cells in found["cells"].values() for seed, cell in cells.items() if cell["others"]}
    for seed, cell in shared.items():  # the plain run's model is every run's shared one
        if "FedIT" in out and seed in out["FedIT"]:
            out["FedIT"][seed]["others"] = cell["others"]["federated"]
    first = [name for name in out if name.partition("@")[0] in ("base", "alone")]
    first += [name for name in ("FedIT",) if name in out]
    return {name: out[name] for name in (*first, *(name for name in out if name not in first))}


def worst(scores: list[float], *, higher: bool) -> float:
    """The mean of the worst tenth, at least one."""
    count = max(1, len(scores) // 10)
    return statistics.mean(sorted(scores, reverse=not higher)[:count])


def show_models(name: str) -> None:
    """A row a model: own rows, others' rows, who is harmed, and what it took."""
    found = read(name)
    higher, known = found["higher"], models(found)
    form = ".3f" if higher else ".2f"
    heads = "seeds | own rows | worst decile | better than alone | harmed | rows of others | sent | memory | seconds"
    print(f"| model | {heads} |")
    print("|---|" + "---:|" * 9)
    for model, seeds in known.items():
        level = model.partition("@")[2]
        method = model.partition("@")[0].partition(",")[0]
        mine = f"{method}, alone@{level}" if level else f"{method}, alone"
        floor = [known.get(f"{one}@{level}" if level else one, {}) for one in ("base", "alone")]
        floor[1] = floor[1] or known.get(mine, {})
        cells = list(seeds.values())
        gaining, harmed, many = 0, 0, 0
        for seed, cell in seeds.items():
            beside = [one[seed]["own"] for one in floor if seed in one]
            if len(beside) == len([one for one in floor if one]):
                many += len(cell["own"])
                own = list(enumerate(cell["own"]))
                gaining += sum(_worse(beside[-1][n], x, higher) for n, x in own) if beside else 0
                harmed += sum(any(_worse(x, one[n], higher) for one in beside) for n, x in own)
        others = [cell["others"] for cell in cells if cell["others"] is not None]
        bare = model.partition("@")[0].endswith(("base", "alone"))
        counted = "" if bare or not many else f" of {many}"
        memory = next((cell["memory"] for cell in cells if cell["memory"] is not None), None)
        texts = [
            model,
            str(len(cells)),
            spread([statistics.mean(cell["own"]) for cell in cells], form),
            spread([worst(cell["own"], higher=higher) for cell in cells], form),
            f"{gaining}{counted}" if counted else "",
            f"{harmed}{counted}" if counted else "",
            spread(others, form) if others else "",
            "" if bare else bytes_text(statistics.mean(cell["up"] for cell in cells)),
            "" if bare or memory is None else bytes_text(memory),
            "" if bare else seconds_text(min(cell["seconds"] for cell in cells)),
        ]
        print(f"| {' | '.join(texts)} |")


def _worse(mine: float, other: float, higher: bool) -> bool:
    return mine < other if higher else mine > other


def show_seeds(name: str, other: str) -> None:
    """How far each model's mean and worst decile lie from another's, in every seed."""
    found = read(name)
    higher, known = found["higher"], models(found)
    print(f"| model | own rows against {other}, by seed | worst decile against it |")
    print("|---|---:|---:|")
    for model, seeds in known.items():
        rest = known[other + ("@" + model.partition("@")[2] if "@" in model and "@" not in other else "")]
        both = sorted(seeds.keys() & rest.keys())
        if model.partition("@")[0] == other or not both or model.partition("@")[0].endswith(("base", "alone")):
            continue

        def change(how: Any, seed: str, mine: Any = seeds, theirs: Any = rest) -> str:
            a, b = how(mine[seed]["own"]), how(theirs[seed]["own"])
            return f"{100 * (a - b):+.1f} points" if higher else f"{100 * (a / b - 1):+.1f} %"

        def tail(scores: list[float]) -> float:
            return worst(scores, higher=higher)

        means, tails = ([change(how, seed) for seed in both] for how in (statistics.mean, tail))
        print(f"| {model} | {', '.join(means)} | {', '.join(tails)} |")


def draw(name: str, other: str) -> None:
    """A point for every client and seed: its own model's score beside the other's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = read(name)
    known = models(found)
    shown = [model for model in known if model != other and model.partition("@")[0] not in ("base",)]
    figure, axes = pyplot.subplots(figsize=(8, 0.42 * len(shown) + 1.4), layout="constrained")
    for y, model in enumerate(shown):
        for at, seed in enumerate(sorted(known[model].keys() & known[other].keys())):
            pairs = zip(known[model][seed]["own"], known[other][seed]["own"], strict=True)
            change = [100 * (a - b) if found["higher"] else 100 * (a / b - 1) for a, b in pairs]
            axes.plot(change, [y + 0.18 * (at - 1)] * len(change), "o", color=f"C{at}", alpha=0.6, markersize=4)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    unit = "points" if found["higher"] else "per cent"
    better = "right is better" if found["higher"] else "left is better"
    axes.set_xlabel(f"{found['metric']} of each client against {other}, {unit}; {better}; a colour a seed")
    figure.savefig(HERE / f"{name}.png", dpi=110)


TABLES = {"models": show_models, "seeds": show_seeds, "draw": draw}

if __name__ == "__main__":
    run_tables(sys.argv[1:], __doc__, collect=collect, tables=TABLES)
