"""The page and the picture of ``benchmarks/diloco.py``, from whatever results there are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["page", "plot"]


def page(found: Mapping[str, Sequence[Mapping[str, Any]]], tried: Mapping[str, Mapping[str, float]]) -> str:
    """The tables as Markdown: what was measured, and the trials of inner rates that came before."""
    first = next(iter(found.values()))[0]
    task = first["config"]
    days = sorted({r["date"] for every in found.values() for r in every})
    base = {r["config"]["seed"]: r["perplexity"] for r in found.get("parallel", [])}
    begin = statistics.mean(r["start"] for r in next(iter(found.values())))
    workers, batch = task["workers"], task["batch"]
    lines = [
        "# Pre-training over slow links",
        "",
        f"{' to '.join(sorted({days[0], days[-1]}))}. Four workers train a Llama of {first['parameters']:,} parameters "
        f"({task['layers']} layers of width {task['width']}, a byte-level BPE of {task['vocabulary']:,} "
        "tokens trained on the same texts) on the State of the Union addresses, each on one era "
        f"({', '.join(format(n, ',') for n in first['rows'])} packed rows of {task['length']} tokens).",
        "",
        f"All ways of a seed begin at one model: {task['common']:,} data-parallel steps from nothing (AdamW at "
        f"{task['common_lr']:g}, {task['warmup']} steps of warmup, then constant; perplexity {begin:.1f}). From there "
        f"every way sees {first['tokens']:,} tokens: {task['steps']:,} inner steps of {batch} rows a worker, AdamW "
        f"with moments of zero, weight decay {task['weight_decay']:g}, gradients cut to norm {task['clip']:g}, "
        f"{task['warmup']} steps of warmup and a cosine to 0. Each way has an inner rate of its own (below). "
        f"Data parallel averages the gradients of all {workers * batch} rows in every step. DiLoCo's outer step is "
        "Nesterov SGD at 0.7 and 0.9 where nothing else is said; plain averaging takes the mean. "
        f"Perplexity is per token over {first['valid_tokens']:,} tokens of held-out addresses, the mean over seeds "
        "(and their range).",
        "",
        "| Way | Inner rate | Seeds | Rounds | Perplexity | Against data parallel | Up, MB a worker "
        "| Largest message, MB | Down, MB a worker | CPU-minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, every in found.items():
        way, values = every[0]["config"], [r["perplexity"] for r in every]
        ratios = [100 * (r["perplexity"] / base[r["config"]["seed"]] - 1) for r in every if r["config"]["seed"] in base]
        rounds = task["steps"] if not way["every"] else task["steps"] * way["fragments"] // way["every"]
        mean = statistics.mean(values)
        spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
        against = f"{statistics.mean(ratios):+.1f} %" if ratios and name != "parallel" else ""
        up, down = (statistics.mean(r[n] for r in every) / way["workers"] / 1e6 for n in ("bytes_up", "least_down"))
        peak, minutes = every[0]["peak_up"] / 1e6, statistics.mean(r["seconds"] for r in every) / 60
        lines.append(
            f"| {way['label']} | {way['lr']:g} | {len(every)} | {rounds:,} | {mean:.2f}{spread} | {against} "
            f"| {up:,.1f} | {peak:.2f} | {down:,.1f} | {minutes:.1f} |"
        )
    lines += [
        "",
        "Bytes are those of the messages as they are packed, 32-bit numbers, nothing compressed. Data parallel counts "
        "one tensor of the model's size up and down in every step. Streaming counts, on the way down, the fragment "
        "that changed. An answer that is dropped is counted as sent. Minutes are those of one core for all workers "
        "together.",
        "",
        "![Perplexity by tokens and by bytes](diloco.png)",
        "",
    ]
    if tried:
        rates = sorted({rate for every in tried.values() for rate in every}, key=float)
        lines += [
            "## Inner rates",
            "",
            "Perplexity (768 rows) after 1,000 inner steps, warmup and cosine as above over those 1,000, on a seed "
            "that no cell has, from a common start of its own:",
            "",
            "| Way | " + " | ".join(rates) + " |",
            "|---|" + "---:|" * len(rates),
            *(
                f"| {name} | " + " | ".join(f"{every[rate]:.2f}" if rate in every else "" for rate in rates) + " |"
                for name, every in tried.items()
            ),
            "",
        ]
    return "\n".join(lines)


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
