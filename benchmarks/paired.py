"""A comparison's methods against one of them, seed by seed.

Means over unequal numbers of seeds cannot be compared where seeds differ more than methods do: each draws other
rows, and the bare model itself is better on some. So every method is divided by the chosen one on the same
seed, and what is told is the mean of those ratios, their range, and how many seeds both have.

Run it: ``python benchmarks/paired.py benchmarks/results/adapt-chat FedIT``; of names after that
only these are shown.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def main(folder: str, chosen: str, *only: str) -> None:
    """Print the table."""
    rows = json.loads((Path(folder) / "compare.json").read_text())["rows"]
    found = {r["method"]: dict(zip(r["seeds"], r["value"]["values"], strict=True)) for r in rows if r["seeds"]}
    base, metric = found[chosen], rows[0]["metric"]
    print(f"| method | seeds | {metric} | {chosen} on the same seeds | difference | range |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, values in found.items():
        both = [seed for seed in values if seed in base]
        if both and name != chosen and (not only or name in only):
            ratios = [100 * (values[s] / base[s] - 1) for s in both]
            mine, theirs = (statistics.mean(x[s] for s in both) for x in (values, base))
            spread = f"{min(ratios):+.1f} to {max(ratios):+.1f} %" if len(ratios) > 1 else ""
            told = (f"{mine:.4g}", f"{theirs:.4g}", f"{statistics.mean(ratios):+.1f} %", spread)
            print(f"| {name} | {len(both)} | " + " | ".join(told) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
