"""The tables of ``years.md``: what streams are scored at before each period is trained on, and what they forget.

``python benchmarks/years.py --collect NAME FOLDER`` reads runs of a ``lichen compare years`` and keeps their matrices
in ``results/years/NAME.json``, beside those of runs that the folder lacks. ``python benchmarks/years.py scored NAME``
prints a row a method and a column a period, ``forgotten NAME`` what each method forgets and costs. ``python
benchmarks/years.py seasons FILE`` writes the rows of chitchat of the people who wrote in spring and in autumn. No table
needs torch.

Legend: R is the matrix of scores, ``R[p][q]`` of the model before period p (p = 0: of the start) on period q.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from collected import run_tables
from tables import show, spread

from lichen.present.units import seconds_text

RESULTS = Path(__file__).resolve().parent / "results" / "years"
METHODS = ("continue", "restart", "replay", "replay-more", "roll-back", "roll-back-wide")
AUTUMN = "2018-09"
LEAST = 20
"""Rows that somebody has in each season."""

Cell = dict[str, Any]


def collect(name: str, folder: Path) -> None:
    """Keep the matrices of every seed and method of a comparison's folder, beside what was kept of others."""
    cells = read(name)
    for file in sorted(folder.glob("*/seed-*/periods.json")):
        periods = json.loads(file.read_text(encoding="utf-8"))
        summary = json.loads((file.parent / "summary.json").read_text(encoding="utf-8"))
        extra = summary["extra"]
        cells.setdefault(file.parent.parent.name.rpartition("-")[0], {})[str(summary["seed"])] = {
            "periods": [one["name"] for one in periods["periods"]],
            "clients": [len(one["clients"]) for one in periods["periods"]],
            "in_force": [one["in_force"] for one in periods["periods"]],
            "matrix": periods["matrix"],
            "prequential": periods["prequential"],
            "forgetting": periods["forgetting"],
            "before": extra.get("forgotten.before"),
            "after": extra.get("forgotten.after"),
            "seconds": summary["seconds"],
        }
    cells = {method: dict(sorted(cells[method].items())) for method in METHODS if method in cells}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, dict[str, Cell]]:
    """What was kept of a comparison, by method and seed; nothing before the first run is collected."""
    file = RESULTS / f"{name}.json"
    found: dict[str, dict[str, Cell]] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return found


def show_scored(name: str) -> None:
    """A row a method, and the frozen model: the mean perplexity of each period before it is trained on, over seeds."""
    cells = read(name)
    first = next(iter(cells.values()))
    names = next(iter(first.values()))["periods"]
    lines = {"frozen": [cell["matrix"][0] for cell in first.values()]}
    lines |= {method: [cell["prequential"] for cell in seeds.values()] for method, seeds in cells.items()}
    rows = [
        [method, str(len(curves)), *(spread([curve[q] for curve in curves], ".1f") for q in range(len(names)))]
        for method, curves in lines.items()
    ]
    show(" | ".join(["perplexity before training", "seeds", *names]), rows)


def show_forgotten(name: str) -> None:
    """A row a method: what its last model is worse at than the best it has had, over all periods but the last."""
    cells = read(name)
    lost = {method: {seed: of_best(cell) for seed, cell in seeds.items()} for method, seeds in cells.items()}
    rows = []
    for method, seeds in cells.items():
        share = [one / other for seed, one in lost[method].items() if (other := lost["continue"].get(seed))]
        runs = list(seeds.values())
        last = [statistics.fmean(run["matrix"][-1]) for run in runs]
        general = [spread([run[when] for run in runs], ".1f") for when in ("before", "after")]
        rows.append(
            [
                method,
                str(len(runs)),
                spread([100 * one for one in lost[method].values()], ".0f") + " %",
                spread(share, ".2f"),
                spread(last, ".1f"),
                " → ".join(general),
                seconds_text(statistics.fmean(run["seconds"] for run in runs)),
            ]
        )
    show("method | seeds | forgotten | of continue's | last model, all periods | general text | a whole run", rows)


def of_best(cell: Cell) -> float:
    """The mean over periods but the last of how much worse the last model is than the best so far, as a share."""
    matrix = cell["matrix"]
    shares = []
    for q in range(len(matrix[0]) - 1):
        column = [row[q] for row in matrix[q + 1 :] if row[q] is not None]
        if column:
            shares.append(column[-1] / min(column) - 1)
    return statistics.fmean(shares)


def write_seasons(file: str) -> None:
    """Write what people chat who have rows in spring and in autumn, a row a line."""
    from lichen.data.sources.records import load_records

    mine = defaultdict(list)
    for record in load_records("chitchat"):
        row = {"client": record.client, "prompt": record.prompt, "completion": record.text, "group": record.group}
        mine[record.client].append({**row, "time": record.time})
    with open(file, "w", encoding="utf-8") as out:
        for rows in mine.values():
            late = sum(str(row["time"]) >= AUTUMN for row in rows)
            if min(late, len(rows) - late) >= LEAST:
                out.writelines(json.dumps(row) + "\n" for row in rows)


TABLES = {"scored": show_scored, "forgotten": show_forgotten, "seasons": write_seasons}

if __name__ == "__main__":
    run_tables(sys.argv[1:], __doc__, collect=collect, tables=TABLES)
