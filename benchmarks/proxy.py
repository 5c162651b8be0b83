"""How much of a small model's tuning reaches a large one through its logits?

Two language models of one tokenizer are trained from nothing on two centuries of speeches: a small one and a large one.
People who chat then tune the small one together, and for reference the large one by the same recipe. Four numbers are
held side by side: the small model before and after, the large one by itself, steered by the small one, and tuned.

Run it: ``python benchmarks/proxy.py --measure FOLDER`` trains and writes ``results/proxy.json``; without an argument it
prints the table.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "proxy.json"
SIZES = {"small": {"width": 64, "layers": 2, "heads": 4}, "large": {"width": 128, "layers": 3, "heads": 4}}
SEEDS = (0, 1, 2)
COLUMNS = (
    ("small", "base", "small, as it was"),
    ("small", "federated", "small, tuned together"),
    ("small", "big", "large, as it was"),
    ("small", "proxy", "large, steered by the small one"),
    ("large", "federated", "large, tuned together"),
)


def speeches(size: str) -> dict[str, Any]:
    """A model from nothing, trained on speeches; both learn the same tokenizer from them."""
    return {
        "name": f"proxy-{size}",
        "task": "chat",
        "model": {"scratch": {"text": "sotu", "vocabulary": 2048, **SIZES[size]}, "adapter": {"kind": "full"}},
        "data": {
            **{"name": "sotu", "form": "stream", "max_length": 64, "valid": 0.05, "test": 0.05},
            "partition": {"by": "iid", "clients": 4},
        },
        "optimizer": {"lr": [2e-3], "schedule": "cosine", "warmup": 100},
        "federation": {
            **{"rounds": 6, "local_steps": 100, "batch_size": 4, "keep_optimizer": True, "valid_every": 6},
            **{"weighting": "uniform", "server": {"lr": 0.7, "momentum": 0.9, "nesterov": True}},
        },
        "compare": {"baselines": []},
    }


def talk(model: Path, seed: int, proxy: Path | None) -> dict[str, Any]:
    """People who chat tune a model together."""
    return {
        "name": "proxy-chat",
        "task": "chat",
        "seed": seed,
        "model": {"name": str(model), "adapter": {"target_modules": "all-linear", "rank": 8, "alpha": 16}},
        "data": {
            **{"name": "chitchat", "form": "transcript", "max_length": 64, "max_clients": 10, "min_rows": 100},
            **{"max_rows": 120, "test_rows": 16, "valid": 0.15, "test": 0.2, "on_too_few_rows": "drop"},
        },
        "optimizer": {"lr": [5e-3], "schedule": "cosine"},
        "federation": {"rounds": 10, "local_steps": 5, "batch_size": 8, "valid_every": 5},
        "compare": {"baselines": ["base"], **({} if proxy is None else {"proxy": str(proxy)})},
    }


def measure(folder: Path) -> None:
    """Train what is not there yet, and write the results."""
    import lichen

    bases = {}
    for size in SIZES:
        run = folder / size
        if not (run / "merged").exists():
            lichen.run(speeches(size), out=run, say=print, resume=run.exists())
            lichen.export(run, merge=True)
        bases[size] = run / "merged"
    rows, weights = [], {size: sum(f.stat().st_size for f in bases[size].glob("*.safetensors")) // 4 for size in bases}
    for seed in SEEDS:
        for size in SIZES:
            run, proxy = folder / f"chat-{size}-{seed}", bases["large"] if size == "small" else None
            summary = lichen.run(talk(bases[size], seed, proxy), out=run, say=print, resume=run.exists()).summary
            found = {**summary["columns"], **summary["extra_columns"]}
            scores = {name: score["mean"] for name, score in found.items() if score is not None}
            rows.append({"model": size, "seed": seed, "scores": scores, "seconds": summary["seconds"]})
        found = {"date": date.today().isoformat(), "weights": weights, "runs": rows}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def table() -> None:
    """Print the results."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    score = {(run["model"], run["seed"]): run["scores"] for run in kept["runs"]}
    seeds = sorted({seed for _, seed in score})
    print(f"| perplexity | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |")
    print(f"|---|{'---:|' * (len(seeds) + 1)}")
    for model, column, title in COLUMNS:
        values = [score[model, seed][column] for seed in seeds]
        print(f"| {title} | {' | '.join(f'{x:.1f}' for x in values)} | {sum(values) / len(values):.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="train, and write the results")
    folder = parser.parse_args().measure
    measure(folder) if folder else table()
