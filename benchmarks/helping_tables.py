"""The tables of ``helping.md`` from a finished ``lichen compare help-reviews``: a row a method, a column a level.

Run it: ``python benchmarks/helping_tables.py [FOLDER] [scores | costs | gains METHOD:OTHER ...]``; without a word it
prints scores and costs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
COSTS = ("skew-50", "skew", "even-50")


def size(count: float | None) -> str:
    """Bytes in the unit that suits them."""
    if count is None:
        return "-"
    unit = max(i for i in range(4) if i == 0 or count >= 1000**i)
    return f"{count / 1000**unit:.0f} {('B', 'kB', 'MB', 'GB')[unit]}"


def scores(rows: dict[tuple[str, str], dict[str, Any]], methods: list[str], levels: list[str]) -> list[str]:
    """Mean and sample deviation of the metric."""
    lines = ["| method | " + " | ".join(levels) + " |", "|---|" + "---:|" * len(levels)]
    for method in methods:
        cells = []
        for level in levels:
            row = rows.get((method, level))
            if row is None or not row["seeds"]:
                cells.append("")
                continue
            spread = f" ± {row['value']['std']:.3f}" if row["value"]["std"] is not None else ""
            few = "" if len(row["seeds"]) == row["wanted"] else f" ({len(row['seeds'])})"
            cells.append(f"{row['value']['mean']:.3f}{spread}{few}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def costs(rows: dict[tuple[str, str], dict[str, Any]], methods: list[str]) -> list[str]:
    """What a run took, at the first level that the method has of :data:`COSTS`."""
    lines = [
        "| method | at | up, a client and round | down | whole run | client memory | FM asked | FM tokens | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in methods:
        level = next((at for at in COSTS if rows.get((method, at), {}).get("seeds")), None)
        row = rows[(method, level)] if level else None
        if level is None or row is None or row["total"] is None:
            continue
        asked, tokens = (f"{x:,.0f}" if x else "-" for x in (row["calls"], row["written"]))
        lines.append(
            f"| {method} | {level} | {size(row['client_up'])} | {size(row['client_down'])} | {size(row['total'])} | "
            f"{size(row['memory'])} | {asked} | {tokens} | {row['seconds']:.0f} |"
        )
    return lines


def gains(rows: dict[tuple[str, str], dict[str, Any]], levels: list[str], pairs: Sequence[str]) -> list[str]:
    """What methods score above others on the same seeds: the mean, and each seed's own difference."""
    lines = ["| method | less | at | difference | each seed's |", "|---|---|---|---:|---:|"]
    for method, other in (pair.split(":") for pair in pairs):
        for level in levels:
            both = [rows.get((name, level), {}) for name in (method, other)]
            if all(row.get("seeds") for row in both):
                mine, theirs = (dict(zip(row["seeds"], row["value"]["values"], strict=True)) for row in both)
                each = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
                listed = ", ".join(f"{value:+.3f}" for value in each)
                if each:
                    lines.append(f"| {method} | {other} | {level} | {statistics.mean(each):+.3f} | {listed} |")
    return lines


def main(folder: str = str(RESULTS / "help-reviews"), part: str = "", *words: str) -> None:
    """Print what is asked for."""
    told = json.loads((Path(folder) / "compare.json").read_text())
    rows = {tuple(row["method"].split("@")): row for row in told["rows"]}
    methods = list(dict.fromkeys(method for method, _ in rows))
    levels = list(told["levels"])
    tables = {
        "scores": lambda: scores(rows, methods, levels),
        "costs": lambda: costs(rows, methods),
        "gains": lambda: gains(rows, levels, words),
    }
    print("\n\n".join("\n".join(tables[name]()) for name in ([part] if part else ["scores", "costs"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
