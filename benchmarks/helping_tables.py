"""The tables of ``helping.md`` from a finished ``lichen compare help-reviews``: a row a method, a column a level.

Run it: ``python benchmarks/helping_tables.py [FOLDER]``.
"""

from __future__ import annotations

import json
import sys
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


def main(folder: str = str(RESULTS / "help-reviews")) -> None:
    """Print both tables."""
    told = json.loads((Path(folder) / "compare.json").read_text())
    rows = {tuple(row["method"].split("@")): row for row in told["rows"]}
    methods = list(dict.fromkeys(method for method, _ in rows))
    print("\n".join([*scores(rows, methods, list(told["levels"])), "", *costs(rows, methods)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
