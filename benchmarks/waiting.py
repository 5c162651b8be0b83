"""Draw validation accuracy over virtual time, from the runs of ``lichen compare buffered``.

``python benchmarks/waiting.py FOLDER`` reads the comparison's folder and writes ``benchmarks/waiting.png``; it prints
how old the answers were, and how long the rounds took.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lichen.present.summary import read_summary
from lichen.present.target import ACCURACY
from lichen.present.trace import lr_name, read_trace

METHODS = {"synchronous": "C0", "deadline": "C2", "buffered-10": "C1", "buffered-5": "C3"}


def main(folder: Path) -> None:
    """One line a seed, in the method's colour."""
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for method, colour in METHODS.items():
        runs = sorted(folder.glob(f"{method}-????????/seed-*"))
        ages, rounds, rates = list[float](), list[float](), list[float]()
        for place, run in enumerate(runs):
            rate = float(read_summary(run)["extra"]["lr.federated"])
            reports = [event.report for event in read_trace(run) if event.grid == lr_name(rate)]
            judged = [r.metrics for r in reports if ACCURACY in r.metrics]
            minutes, right = [m["time"] / 60 for m in judged], [m[ACCURACY] for m in judged]
            axes.plot(minutes, right, color=colour, lw=1, alpha=0.8, label=None if place else method)
            ages.append(mean(r.metrics.get("age", 0.0) for r in reports))
            rounds.append(reports[-1].metrics["time"] / len(reports))
            rates.append(rate)
        print(f"{method}: mean age {mean(ages):.2f}, {mean(rounds):.0f} s a step, rates {rates}")
    axes.axhline(0.88, color="grey", lw=0.6)
    axes.set(xscale="log", xlabel="virtual minutes", ylabel="validation accuracy", ylim=(0.3, 1))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(Path(__file__).with_name("waiting.png"), dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
