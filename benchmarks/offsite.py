"""The emulators and the tables of ``offsite.md``.

``python benchmarks/offsite.py make chat`` (or ``reviews``) writes every emulator of ``lichen compare offsite-chat``
into ``./emulators``, and goes on where it was stopped. ``--collect NAME FOLDER`` reads a comparison's runs and keeps
their columns and the provenance of their emulators in ``results/NAME/offsite.json``, beside those of runs that the
folder lacks. ``table NAME`` prints a row a method, ``made NAME`` a row an emulator. None of these needs torch, but for
``make``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tables import spread

HERE = Path(__file__).resolve().parent
COLUMNS = ("base", "emulator_base", "emulator", "plugged", "full")
MADE: dict[str, dict[str, Any]] = {
    "chat": {
        "model": "smollm2-135m",
        "ends": "2,2",
        "layers": (16, 8, 4),
        "how": ("drop", "distil", "low-rank", "raised"),
        "steps": 300,
    },
    "reviews": {
        "model": "minilm-l6",
        "ends": "1,1",
        "layers": (2, 1),
        "how": ("drop", "distil", "low-rank"),
        "steps": 400,
    },
}


def make(group: str, folder: Path = Path("emulators")) -> None:
    """Write the emulators of a comparison that are not there yet."""
    from lichen.recipes.offsite.emulate import Training, emulate

    about = MADE[group]
    for layers in about["layers"]:
        for how in about["how"]:
            out = folder / f"{group}-{layers}-{how}"
            if out.exists():
                continue
            print(out, flush=True)
            trains = how in ("distil", "raised")
            training = Training(public="sotu", steps=about["steps"]) if trains else None
            more: dict[str, Any] = {"ends": about["ends"], "layers": layers, "how": how, "training": training}
            emulate(about["model"], out=out, say=lambda line: print(" ", line, flush=True), **more)


def collect(name: str, folder: Path) -> None:
    """Keep the columns of every method and seed of a comparison's folder, and what its emulators say of themselves."""
    out = HERE / "results" / name / "offsite.json"
    kept: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": {}, "made": {}}
    for file in sorted(folder.glob("*/seed-*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        method = file.parent.parent.name.rpartition("-")[0]
        scores = {**summary["columns"], **summary["extra_columns"]}
        means = {column: scores[column]["mean"] for column in COLUMNS if scores.get(column)}
        cell = {"means": means, "seconds": summary["seconds"], "up": summary["bytes_up"]}
        kept["cells"].setdefault(method, {})[str(summary["seed"])] = cell
        kept["higher"] = summary["higher_is_better"]
        manifest = json.loads((file.parent / "adapter" / "emulator.json").read_text(encoding="utf-8"))
        kept["made"][method] = {key: manifest[key] for key in ("ends", "middle", "of", "how", "provenance", "emulator")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """What was kept of a comparison."""
    found: dict[str, Any] = json.loads((HERE / "results" / name / "offsite.json").read_text(encoding="utf-8"))
    return found


def table(name: str) -> None:
    """A row a method: the columns, the share of the full model's gain that is left, and whether the order holds."""
    kept = read(name)
    print(f"| middle | seeds | {' | '.join(COLUMNS)} | share of the gain | in order | seconds |")
    print(f"|---|{'---:|' * (len(COLUMNS) + 4)}")
    for method, cells in kept["cells"].items():
        each = [cell["means"] for _, cell in sorted(cells.items())]
        shown = [spread([one[c] for one in each if c in one]) if any(c in one for one in each) else "" for c in COLUMNS]
        both = [one for one in each if {"base", "full"} <= one.keys()]
        shares = [(one["plugged"] - one["base"]) / (one["full"] - one["base"]) for one in both]
        judged = [in_order(one, higher=kept["higher"]) for one in each if "full" in one]
        seconds = round(min(cell["seconds"] for cell in cells.values()))
        share = spread(shares) if shares else ""
        order = f"{sum(judged)} of {len(judged)}" if judged else ""
        print(f"| {method} | {len(each)} | {' | '.join(shown)} | {share} | {order} | {seconds} |")


def in_order(one: dict[str, float], *, higher: bool) -> bool:
    """Whether base < plugged < full and emulator < plugged, the better being the greater; some tasks have no base."""
    sign = 1 if higher else -1
    pairs = (("base", "plugged"), ("plugged", "full"), ("emulator", "plugged"))
    return all(sign * one[a] < sign * one[b] for a, b in pairs if a in one and b in one)


def made(name: str) -> None:
    """A row an emulator: how it was made, and how far it is from its model."""
    heads = ("made of", "how", "blocks", "steps", "distance before", "after", "loss before", "after", "the model's")
    print(f"| middle | {' | '.join(heads)} |\n|---|---|---|{'---:|' * 7}")
    for method, about in read(name)["made"].items():
        source, middle = about["provenance"], ", ".join(map(str, about["middle"]))
        before, after = source.get("before", {}), source.get("after", {})
        numbers = (
            *(one.get("distance") for one in (before, after)),
            *(one.get("loss") for one in (before, after)),
            before.get("model_loss"),
        )
        shown = " | ".join("" if x is None else f"{x:.3f}" for x in numbers)
        blocks = f"{sum(about['ends']) + len(about['middle'])} of {about['of']}"
        print(f"| {method} | {middle} | {about['how']} | {blocks} | {source.get('steps', '')} | {shown} |")


def main(words: list[str]) -> int:
    match words:
        case ["make", group]:
            make(group)
        case ["--collect", name, folder]:
            collect(name, Path(folder))
        case ["table", name]:
            table(name)
        case ["made", name]:
            made(name)
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
