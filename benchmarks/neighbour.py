"""A run beside a busy neighbour: threads that spin while they wait for one another, and threads that sleep.

torch shares out each operation among threads, and those that are done wait. By default they spin, which on a machine
with other work takes the core from the very thread they wait for. Each row is the wall time of ``lichen run`` in the
ways below, in turn, alone and beside as many busy processes as the machine has cores.

    python benchmarks/neighbour.py --repeat 3
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = {
    "digits": ["digits"],
    "chat": ["chat-demo", "-s", "federation.rounds=1", "-s", "data.max_clients=4", "-s", "compare.baselines=[base]"],
}
CORES = len(os.sched_getaffinity(0))
WAYS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "10,000 turns": {"GOMP_SPINCOUNT": "10000"},
    "1,000 turns": {"GOMP_SPINCOUNT": "1000"},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def spin() -> None:
    """A neighbour: arithmetic without end."""
    while True:
        sum(range(10_000))


def seconds(words: list[str], way: dict[str, str]) -> float:
    """Wall time of one run in a process of its own."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "lichen", "run", *words, "--out", str(Path(folder) / "run")]
        subprocess.run(command, env=known | way, check=True, capture_output=True, timeout=1800)
        return time.perf_counter() - start


def main() -> None:
    """Print seconds, the median of the repeats, by way and company."""
    reads = argparse.ArgumentParser(description=__doc__)
    reads.add_argument("--repeat", type=int, default=3)
    reads.add_argument("--runs", nargs="*", default=list(RUNS))
    chosen = reads.parse_args()
    print(f"{CORES} cores\n{'run':8}{'neighbours':>12}" + "".join(f"{way:>16}" for way in WAYS), flush=True)
    for name in chosen.runs:
        for neighbours in (0, CORES):
            busy = [multiprocessing.Process(target=spin, daemon=True) for _ in range(neighbours)]
            for one in busy:
                one.start()
            try:
                took: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(chosen.repeat):
                    for way, environment in WAYS.items():
                        took[way].append(seconds(RUNS[name], environment))
            finally:
                for one in busy:
                    one.terminate()
            medians = "".join(f"{statistics.median(values):>16.1f}" for values in took.values())
            print(f"{name:8}{neighbours:>12}{medians}", flush=True)


if __name__ == "__main__":
    main()
