"""The tables and the picture of ``diloco.md``, from whatever results there are; torch is not needed.

Run it: ``python benchmarks/diloco_page.py ways`` or ``rates``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot", "rates", "results", "ways"]

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("parallel", "h5", "h25", "h100", "h500", "plain-h100", "drop-h100", "stream-h100")


def results() -> dict[str, list[dict[str, Any]]]:
    """What is there, by way; those of one task, that of the first result."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in WAYS:
        for file in sorted(RESULTS.glob(f"diloco-{name}-s?.json")):
            found.setdefault(name, []).append(json.loads(file.read_text(encoding="utf-8")))
    return found


def ways(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What each way reached and sent: means over seeds, and the range where there are several.

    Bytes down are those that were measured. Streaming sends a fragment up, and the whole model down in each of its
    rounds; what its fragments alone would have been stands beside.
    """
    base = {r["config"]["seed"]: r["perplexity"] for r in found.get("parallel", [])}
    lines = [
        "| Way | Inner rate | Seeds | Rounds | Perplexity | Against data parallel | Up, MB a worker "
        "| Largest message, MB | Down, MB a worker | CPU-minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, every in found.items():
        way, values = every[0]["config"], [r["perplexity"] for r in every]
        ratios = [100 * (r["perplexity"] / base[r["config"]["seed"]] - 1) for r in every if r["config"]["seed"] in base]
        rounds = way["steps"] if not way["every"] else way["steps"] * way["fragments"] // way["every"]
        mean = statistics.mean(values)
        spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        against = f"{statistics.mean(ratios):+.1f} %" if ratios and name != "parallel" else ""
        up, down, least = (
            statistics.mean(r[n] for r in every) / way["workers"] / 1e6
            for n in ("bytes_up", "bytes_down", "least_down")
        )
        peak, minutes = every[0]["peak_up"] / 1e6, statistics.mean(r["seconds"] for r in every) / 60
        sent = f"{down:,.1f}" if down == least else f"{down:,.1f} (fragments alone: {least:,.1f})"
        lines.append(
            f"| {way['label']} | {way['lr']:g} | {len(every)} | {rounds:,} | {mean:.2f}{spread} | {against} "
            f"| {up:,.1f} | {peak:.2f} | {sent} | {minutes:.1f} |"
        )
    return lines


def rates() -> list[str]:
    """Perplexity after the short trials of inner rates."""
    file = RESULTS / "diloco-trial.json"
    tried = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    names = sorted({rate for every in tried.values() for rate in every}, key=float)
    return [
        "| Way | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        *(
            f"| {name} | " + " | ".join(f"{every[rate]:.2f}" if rate in every else "" for rate in names) + " |"
            for name, every in tried.items()
        ),
    ]


def plot(found: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Perplexity by tokens, and at the end by bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for i, every in enumerate(found.values()):
        colour = f"C{i}"
        count = min(len(r["curve"]) for r in every)
        tokens = [point["tokens"] / 1e6 for point in every[0]["curve"][:count]]
        values = [statistics.mean(r["curve"][k]["perplexity"] for r in every) for k in range(count)]
        left.plot(tokens, values, color=colour, label=every[0]["config"]["label"], linewidth=1.4)
        for result in every:
            right.scatter(
                result["bytes_up"] / result["config"]["workers"] / 1e6, result["perplexity"], color=colour, s=22
            )
    left.set(xlabel="million tokens, all workers", ylabel="perplexity, 768 held-out rows")
    right.set(xlabel="MB sent by a worker", ylabel="perplexity at the end, all held-out rows", xscale="log")
    left.legend(fontsize=7, title="colours of both pictures", title_fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    print("\n".join(rates() if sys.argv[1] == "rates" else ways(results())))
