"""What robust rules cost the server: seconds and memory beside the mean's, and a thousand clients in bounded memory.

Each cell is a process of its own, which folds messages of ten clients and closes the round. It tells the seconds of
``add`` and ``close``, and how far its memory rose over what it held before the first message (Linux).
``python benchmarks/robust.py --write`` measures, under three minutes, and keeps ``results/robust.json``;
``python benchmarks/robust.py`` prints the tables of that file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from lichen.core.message import Message
from lichen.core.seeds import torch_generator
from lichen.core.wire.shared import Shared
from lichen.server.mean import Mean
from lichen.server.robust.robust import Robust

RESULTS = Path(__file__).with_name("results") / "robust.json"
NUMBERS = 460_800
ABREAST = 10
MIB = 2**20
BOUND, CONSTANT = 512 * MIB, 256 * MIB

RULES = {
    "mean": {},
    "norm_bound": {},
    "geometric_median": {},
    "centred_clipping": {"radius": 1.0},
    "krum": {},
    "multi_krum": {},
    "multi_krum, mixing": {"mixing": True},
    "median": {},
    "median, mixing": {"mixing": True},
    "trimmed_mean": {},
}


def message(first: int) -> Message:
    """Random changes of ten clients."""
    g = torch_generator(3, first)
    ids = torch.arange(first, first + ABREAST)
    tensors = {"w": torch.randn(ABREAST, NUMBERS, generator=g) * 1e-2}
    weight_C = torch.ones(ABREAST, dtype=torch.float64)
    return Message(group="g", client_C=ids, version_C=torch.zeros_like(ids), tensors=tensors, weight_C=weight_C)


def status(key: str) -> int:
    """Bytes of memory that this process holds (``VmRSS``), or has held at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def cell(name: str, clients: int, memory: int, threads: int) -> dict[str, float]:
    """Seconds and bytes of one round."""
    torch.set_num_threads(threads)
    liars = clients // 10
    rule = name.partition(",")[0]
    aggregator = Mean() if name == "mean" else Robust(rule, liars=liars, memory=memory, **RULES[name])
    shared = Shared({"w": torch.zeros(NUMBERS)})
    torch.ones(64, 64).double() @ torch.ones(64, 64).double()
    message(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, seconds, total = status("VmRSS"), 0.0, aggregator.zero()
    for first in range(0, clients, ABREAST):
        some = message(first)
        start = time.perf_counter()
        total = aggregator.add(total, some)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    change, _ = aggregator.close(total, shared)
    seconds += time.perf_counter() - start
    assert change.trainable["w"].shape == (NUMBERS,)
    return {"seconds": seconds, "bytes": status("VmHWM") - before}


def measured(name: str, clients: int, memory: int, threads: int) -> dict[str, float]:
    """A cell in a process of its own."""
    command = [sys.executable, __file__, "--cell", name, str(clients), str(memory), "--threads", str(threads)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def write(threads: int) -> None:
    """Measure everything and keep it."""
    beside = {name: measured(name, 100, 2**30, threads) for name in RULES}
    bounded = {name: measured(name, 1000, BOUND, threads) for name in ("multi_krum", "trimmed_mean")}
    kept = {"threads": threads, "torch": torch.__version__, "beside": beside, "bounded": bounded}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def show() -> None:
    """Print the tables of what was measured."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    mean = results["beside"]["mean"]
    print("| 100 clients | seconds, of the mean's | memory, of the mean's |")
    print("|---|---:|---:|")
    for name, one in results["beside"].items():
        print(f"| `{name}` | {one['seconds'] / mean['seconds']:.1f} | {one['bytes'] / mean['bytes']:.1f} |")
    print()
    print("| 1,000 clients | seconds, of the mean's at 100 | rows, MiB | bound, MiB | memory, MiB | beyond the bound |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, one in results["bounded"].items():
        rows, more = 1000 * NUMBERS * 4 / MIB, one["bytes"] - BOUND
        print(
            f"| `{name}` | {one['seconds'] / mean['seconds']:.0f} | {rows:.0f} | {BOUND // MIB} "
            f"| {one['bytes'] / MIB:.0f} | {more / MIB:.0f} of {CONSTANT // MIB} |"
        )


def main() -> int:
    """Measure, print, or run one cell for the process that asked; 1 if memory went past its bound."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--write", action="store_true", help="measure anew")
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--cell", nargs=3, metavar=("RULE", "CLIENTS", "MEMORY"), help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.cell:
        print(json.dumps(cell(args.cell[0], int(args.cell[1]), int(args.cell[2]), args.threads)))
        return 0
    if args.write:
        write(args.threads)
    show()
    bounded = json.loads(RESULTS.read_text(encoding="utf-8"))["bounded"].values()
    return int(any(one["bytes"] > BOUND + CONSTANT for one in bounded))


if __name__ == "__main__":
    sys.exit(main())
