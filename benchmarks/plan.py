"""How near does ``lichen plan`` come to the run that follows?

Each recipe is planned and then run, both in fresh processes on the same machine; memory, bytes and seconds of the
plan stand beside those of the run's summary. Bytes are counted and must be equal; memory and seconds are measured
on a few blocks, and are expected within a quarter.

Run it: ``python benchmarks/plan.py``, or with the names of some recipes. Under six minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "chat-demo": (
        "data.max_clients=8",
        "data.test_rows=6",
        "federation.rounds=3",
        "federation.clients_per_round=8",
        "federation.local_steps=2",
        "federation.valid_every=3",
    ),
    "reviews-lora": (
        "data.max_clients=8",
        "data.max_rows=100",
        "federation.rounds=4",
        "federation.clients_per_round=4",
        "federation.valid_every=2",
        "optimizer.grid_rounds=1",
    ),
    "chat-demo split": (
        "data.max_clients=4",
        "data.test_rows=6",
        "federation.rounds=2",
        "federation.clients_per_round=4",
        "federation.local_steps=2",
        "federation.valid_every=2",
        "split.client={first: 2, last: 1}",
        "compare.baselines=[base]",
    ),
}
"""What is planned and run, with the keys that make it short."""


def lichen(*words: str) -> tuple[dict[str, Any], float]:
    """What one command prints as JSON, and the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "lichen", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"lichen {' '.join(words)} ended with {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout), time.perf_counter() - start


def compared(recipe: str, settings: tuple[str, ...]) -> list[tuple[str, float, float]]:
    """``(what, planned, actual)`` of one recipe, and what planning took of the run's time."""
    words = [recipe.split()[0], *(word for setting in settings for word in ("-s", setting))]
    plan, took = lichen("plan", *words)
    with tempfile.TemporaryDirectory(prefix="lichen-plan-benchmark-") as folder:
        run, _ = lichen("run", *words, "--quiet", "--out", str(Path(folder) / "run"))
    rows = [
        ("bytes up", plan["bytes"]["up"], run["bytes_up"]),
        ("bytes down", plan["bytes"]["down"], run["bytes_down"]),
        ("peak memory (MB)", plan["memory"]["peak"] / 1e6, run["peak_memory_bytes"] / 1e6),
        ("seconds", plan["seconds"], run["seconds"]),
    ]
    if plan["joules"] is not None and run["energy_joules"] is not None:
        rows.append(("joules", plan["joules"], run["energy_joules"]))
    return [*rows, ("seconds of planning", took, run["seconds"])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="some of them; all if none is named")
    wanted = parser.parse_args().recipes or tuple(RECIPES)
    print("| recipe | | planned | actual | planned / actual |")
    print("|---|---|---:|---:|---:|")
    for recipe in wanted:
        for what, planned, actual in compared(recipe, RECIPES[recipe]):
            ratio = f"{planned / actual:.3f}" if what != "seconds of planning" else f"{planned / actual:.2f} of the run"
            whole = what.startswith("bytes")
            shown = (f"{planned:,.0f}", f"{actual:,.0f}") if whole else (f"{planned:,.1f}", f"{actual:,.1f}")
            print(f"| {recipe} | {what} | {shown[0]} | {shown[1]} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
