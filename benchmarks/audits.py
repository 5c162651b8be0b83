"""What can be read off runs of one recipe, without protection and with noise that hides every row?

A small cut of ``reviews-lora``, one row a step: open, under masks (the sums of the open run's rounds, which are all
that the server then sees), at two budgets of ε, and open again where the span test of text
must fail, for a step or a round has more inputs than LoRA's rank. Each is then audited as ``lichen audit`` does it.

``python benchmarks/audits.py --run`` makes the runs and keeps what was found; ``python benchmarks/audits.py canaries
--run`` those with canaries, open and at ε = 8. Without ``--run`` the tables are printed from that, the one that is
named or the first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tables

RESULT = Path(__file__).resolve().parent / "results" / "audits.json"
CANARIES = RESULT.with_name("canaries.json")
MESSAGES, ROWS = 12, 1000

KEYS = (
    "model.layers=2",
    "model.adapter.rank=64",
    "model.adapter.alpha=128",
    "data.max_length=48",
    "data.max_clients=6",
    "data.max_rows=40",
    "data.test=0.5",
    "optimizer={name: sgd, lr: [0.1]}",
    "federation={rounds: 12, local_steps: 1, batch_size: 1, weighting: uniform, history: true}",
    "compare={baselines: [], metric: macro_f1}",
)
RUNS: dict[str, tuple[str, ...]] = {
    "open": (),
    "epsilon-8": ("privacy={unit: row, epsilon: 8, delta: 1.0e-3, clip: 0.1}",),
    "epsilon-3": ("privacy={unit: row, epsilon: 3, delta: 1.0e-3, clip: 0.1}",),
    "rank-8": ("model.adapter.rank=8", "model.adapter.alpha=16"),
    "ten-steps": ("federation.local_steps=10",),
}
"""What is added to the recipe, by the run's name."""

PLANTED: dict[str, tuple[str, ...]] = {
    "digits": (
        "data.partition={by: iid, clients: 6}",
        "data.valid=0.0",
        "optimizer={name: sgd, lr: [0.1], momentum: 0.9}",
        "federation={rounds: 40, local_steps: 4, batch_size: 64, aggregate: mean, weighting: uniform}",
        "compare={baselines: [], metric: accuracy}",
        "audit={canaries: 200}",
    ),
    "reviews-lora": (
        "model.layers=1",
        "model.adapter.rank=4",
        "model.adapter.alpha=8",
        "data.max_length=16",
        "data.max_clients=3",
        "data.max_rows=80",
        "data.test=0.3",
        "data.valid=0.0",
        "optimizer={name: adamw, lr: [1.0e-2]}",
        "federation={rounds: 40, local_steps: 4, batch_size: 16, weighting: uniform}",
        "compare={baselines: [], metric: accuracy}",
        "audit={canaries: 100}",
    ),
}
"""What is changed in a recipe, by its name, to plant canaries in a small run."""
PROMISES: dict[str, tuple[str, ...]] = {
    "open": (),
    "epsilon-8": ("privacy={unit: row, epsilon: 8, delta: 1.0e-5, clip: 1.0}",),
}


def measure_canaries() -> None:
    """Make runs with canaries, one after the other, audit each, and keep what the canaries show."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    import lichen
    from lichen.allocator import keep_large_buffers
    from lichen.recipes.audit.audit import audit

    keep_large_buffers()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as place:
        for recipe, keys in PLANTED.items():
            for name, more in PROMISES.items():
                start = time.process_time()
                done = lichen.run(lichen.read_recipe(recipe, (*keys, *more)), out=Path(place) / recipe / name)
                trained = time.process_time()
                found = audit(done.folder, rows=100).canaries
                assert found is not None
                runs.append({
                    "recipe": recipe,
                    "run": name,
                    "score": done.summary["columns"]["federated"]["mean"],
                    "seconds": {"run": trained - start, "audit": time.process_time() - trained},
                    **asdict(found),
                })  # fmt: skip
                result = {"date": date.today().isoformat(), "keys": PLANTED, "more": PROMISES, "runs": runs}
                CANARIES.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def measure() -> None:
    """Make the runs one after the other, audit each, and keep what was found."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    import lichen
    from lichen.allocator import keep_large_buffers
    from lichen.recipes.audit.several import audit_several

    keep_large_buffers()
    torch.set_num_threads(1)
    runs: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as place:
        for name, more in RUNS.items():
            start = time.perf_counter()
            done = lichen.run(lichen.read_recipe("reviews-lora", (*KEYS, *more)), out=Path(place) / name)
            trained = time.perf_counter()
            (one,) = audit_several([done.folder], rows=ROWS, messages=MESSAGES)
            ended = time.perf_counter()
            privacy = done.summary["privacy"] or {}
            if name == "open":  # masks leave the same model, and the sum of each round
                (masked,) = audit_several([done.folder], rows=ROWS, messages=MESSAGES, sums=True)
                f1 = done.summary["columns"]["federated"]["mean"]
                seconds = {"run": trained - start, "audit": time.perf_counter() - ended}
                about = {"protected_by": "masks", "epsilon": None, "sigma": None, "macro_f1": f1, "seconds": seconds}
                runs["masked"] = {**about, **asdict(masked.found)}
            runs[name] = {
                "protected_by": one.protected_by,
                "epsilon": one.epsilon,
                "sigma": privacy.get("sigma"),
                "macro_f1": done.summary["columns"]["federated"]["mean"],
                "seconds": {"run": trained - start, "audit": ended - trained},
                **asdict(one.found),
            }
            result = {"date": date.today().isoformat(), "keys": KEYS, "more": RUNS, "runs": runs}
            RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_of(messages: Sequence[dict[str, Any]]) -> str:
    """How many inputs are read, of how many."""
    return f"{sum(x['right'] for x in messages)} of {sum(x['inputs'] for x in messages)}" if messages else "-"


def runs_table(runs: dict[str, Any]) -> None:
    """A line for each run, as ``lichen audit`` has it."""
    rows = []
    for name, run in runs.items():
        best = max(run["membership"].values(), key=lambda x: x["auc"])
        wrong = sum(x["found"] - x["right"] for x in run["messages"])
        epsilon = "-" if run["epsilon"] is None else f"{math.ceil(1000 * run['epsilon']) / 1000:.3f}"
        rows.append([
            name, run["protected_by"], epsilon,
            f"{best['auc']:.3f}", f"{best['auc_low']:.3f} to {best['auc_high']:.3f}",
            f"{best['tpr']:.1%}", f"{best['tpr_low']:.1%} to {best['tpr_high']:.1%}",
            read_of(run["messages"]), str(wrong),
            f"{run['macro_f1']:.3f}",
        ])  # fmt: skip
    heads = "run | protected by | ε | AUC | 95 % | found at 1 % false | 95 % | read of messages | false | macro F1"
    tables.show(heads, rows, words=2)


def members_table(runs: dict[str, Any]) -> None:
    """AUC of every score."""
    scores = list(next(iter(runs.values()))["membership"])
    rows = []
    for name, run in runs.items():
        cells = [run["membership"][score] for score in scores]
        rows.append([name, *(f"{x['auc']:.3f} ({x['auc_low']:.3f} to {x['auc_high']:.3f})" for x in cells)])
    tables.show(" | ".join(["run", *(score.replace("min_k", "Min-K %") for score in scores)]), rows)


def messages_table(runs: dict[str, Any]) -> None:
    """What is read where a message has fewer inputs than the bound, and where it has as many or more."""
    rows = []
    for name, run in runs.items():
        for round_ in sorted({x["round"] for x in run["messages"]}):
            some = [x for x in run["messages"] if x["round"] == round_]
            below = [x for x in some if x["inputs"] < x["bound"]]
            above = [x for x in some if x["inputs"] >= x["bound"]]
            inputs = [x["inputs"] for x in some]
            leaves = " and ".join(sorted({x["tensor"].rpartition("_")[2] for x in some}))
            rows.append([
                name, leaves, str(round_), str(some[0]["bound"]),
                f"{min(inputs)} to {max(inputs)}", f"{statistics.median(x['span'] for x in some):.0f}",
                str(len(below)), read_of(below), str(len(above)), read_of(above),
            ])  # fmt: skip
    heads = (
        "run | factor | round | bound | inputs | span, median | messages below the bound | read | at or above | read"
    )
    tables.show(heads, rows, words=2)


def seconds_table(runs: dict[str, Any]) -> None:
    """Seconds of each run, and of its audit."""
    rows = [[name, f"{run['seconds']['run']:.0f}", f"{run['seconds']['audit']:.0f}"] for name, run in runs.items()]
    tables.show("run | training, s | audit, s", rows)


def canaries_table(runs: Sequence[dict[str, Any]]) -> None:
    """A line for each run with canaries: exposure, guesses, and the least ε that fits them."""
    rows = []
    for run in runs:
        bound, promised = run["bound"], run["promised"]
        rows.append([
            run["recipe"], run["run"], "-" if promised is None else f"{math.ceil(1000 * promised) / 1000:.3f}",
            f"{run['included']} of {run['canaries']}", f"{run['exposure']:.2f}",
            f"{run['exposure_most']:.2f} of {run['exposure_full']:.2f}",
            f"{bound['right']} of {bound['guesses']}", f"{bound['epsilon']:.3f}",
            f"{run['score']:.3f}", f"{run['seconds']['run']:.0f}", f"{run['seconds']['audit']:.0f}",
        ])  # fmt: skip
    heads = "recipe | run | ε promised | canaries in | exposure, bits | most | right | ε at least | accuracy"
    tables.show(f"{heads} | training, s | audit, s", rows, words=2)


TABLES = {"runs": runs_table, "members": members_table, "messages": messages_table, "seconds": seconds_table}


def main() -> None:
    """Measure, or print a table of what was kept."""
    reads = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reads.add_argument("table", nargs="?", choices=[*TABLES, "canaries"], default="runs")
    reads.add_argument("--run", action="store_true", help="measure")
    asked = reads.parse_args()
    if asked.table == "canaries":
        if asked.run:
            measure_canaries()
        canaries_table(json.loads(CANARIES.read_text(encoding="utf-8"))["runs"])
        return
    if asked.run:
        measure()
    TABLES[asked.table](json.loads(RESULT.read_text(encoding="utf-8"))["runs"])


if __name__ == "__main__":
    main()
