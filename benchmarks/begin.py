"""How many rounds is a start worth, and what does skew take from it?

Reads the runs of ``lichen compare begin-reviews``. Of each start the rate with the lowest validation loss counts. The
target is the lowest validation loss that random weights ever reach; a start's rounds are those until it is there.

Run it: ``python benchmarks/begin.py [FOLDER]``; it writes ``results/begin.json``, and where there are no runs it
prints what stands there.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
STARTS = {"random": ("random", "random-slow"), "taught": ("taught", "taught-slow"), "encoder": ("encoder",),
          "headed": ("headed",)}  # fmt: skip
LEVELS = ("even", "skew")


def curve(run: Path) -> list[float]:
    """The validation loss after each round."""
    events = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    last = {event["round"]: event["metrics"]["valid"] for event in events if event["column"] == "federated"}
    return [last[number] for number in sorted(last)]


def runs(folder: Path, level: str) -> dict[int, dict[str, dict[str, Any]]]:
    """The better rate of every start, by seed; only seeds where all rates are done."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for start, names in STARTS.items():
        every: dict[int, list[dict[str, Any]]] = {}
        for file in (f for name in names for f in folder.glob(f"{name}@{level}-*/seed-*/summary.json")):
            summary = json.loads(file.read_text())
            one = {"name": summary["name"], "curve": curve(file.parent), "f1": summary["columns"]["federated"]["mean"]}
            every.setdefault(summary["seed"], []).append(one)
        for seed, some in every.items():
            if len(some) == len(names):
                found.setdefault(seed, {})[start] = min(some, key=lambda one: min(one["curve"]))
    return found


def found(folder: Path) -> list[dict[str, Any]]:
    """A row a start, level and seed."""
    rows = []
    for level in LEVELS:
        for seed, starts in sorted(runs(folder, level).items()):
            if "random" not in starts:
                continue
            target = min(starts["random"]["curve"])
            for start, one in starts.items():
                reached = next((i for i, loss in enumerate(one["curve"], 1) if loss <= target), None)
                rows.append({"level": level, "seed": seed, "start": start, "rate": one["name"], "rounds": reached,
                             "of": len(one["curve"]), "target": target, "best": min(one["curve"]),
                             "macro_f1": one["f1"]})  # fmt: skip
    return rows


def main(folder: str = str(RESULTS / "begin-reviews")) -> None:
    """Print the table."""
    file = RESULTS / "begin.json"
    if any(Path(folder).glob("*/seed-*/trace.jsonl")):
        file.write_text(json.dumps(found(Path(folder)), indent=1) + "\n")
    rows = json.loads(file.read_text())
    print("| start | rows | rounds until the best loss of random weights | lowest loss | macro F1 | seeds |")
    print("|---|---|---:|---:|---:|---:|")
    for start in STARTS:
        for level in LEVELS:
            some = [row for row in rows if (row["start"], row["level"]) == (start, level)]
            if some:
                rounds = ", ".join(str(row["rounds"] or f"not in {row['of']}") for row in some)
                best, f1 = (statistics.mean(row[key] for row in some) for key in ("best", "macro_f1"))
                print(f"| {start} | {level} | {rounds} | {best:.3f} | {f1:.3f} | {len(some)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
