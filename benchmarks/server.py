"""What the server costs: folding 10,000 adapters, and closing a round at the shapes of a 7B model.

The fold is told as a share of this machine's plain copy: bytes of messages folded a second over bytes
that ``Tensor.copy_`` takes from one large buffer to another a second, both timed in this run, in turn,
with the same threads. Each close runs in a process of its own, which tells its seconds and how far its
memory rose. ``python benchmarks/server.py`` prints the tables and draws ``server.png``; under four minutes,
or under one with ``--quick``. ``--against CHECKOUT`` folds with the package of another checkout in turn with
this one, and prints this one's seconds over the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lichen.core.message import Message
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree, nbytes
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.factors import best
from lichen.server.lowrank.lowrank import FedEx, LowRank
from lichen.server.mean import Mean

SMOLLM2 = {f"{k}.{part}": (m, 576, 8) for k in range(30) for part, m in (("q", 576), ("v", 192))}
SHAPES_7B = ((4096, 4096), (4096, 11008))
RANK_7B = 16
LAYERS_7B = 32


def adapters(layers: dict[str, tuple[int, int, int]], clients: int, first: int, seed: int) -> Message:
    """Random changes of adapters (out, in, rank), as a block of clients sends them."""
    g = torch_generator(seed, first)
    tensors: Tree = {}
    for name, (m, n, r) in layers.items():
        tensors[f"{name}.lora_A"] = torch.randn(clients, r, n, generator=g) * 1e-2
        tensors[f"{name}.lora_B"] = torch.randn(clients, m, r, generator=g) * 1e-2
    ids = torch.arange(first, first + clients)
    weight_C = torch.randint(1, 200, (clients,), generator=g).double()
    return Message(group="g", client_C=ids, version_C=torch.zeros_like(ids), tensors=tensors, weight_C=weight_C)


def copy_rate(buffers: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Bytes a second that ``copy_`` takes from one buffer to the other; the best of five."""
    source, target = buffers
    best_s = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - start)
    return source.nbytes / best_s


def fold(aggregator: Mean | LowRank, abreast: int, clients: int, buffers: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """Fold so many clients, ``abreast`` a message, from a pool of messages too large for a cache."""
    pool = [adapters(SMOLLM2, abreast, 0, seed) for seed in range(max(2, 256 // abreast))]
    size = nbytes(pool[0].tensors)
    before, total, seconds = copy_rate(buffers), aggregator.zero(), 0.0
    for k in range(max(1, clients // abreast)):
        message = pool[k % len(pool)]
        message.client_C.copy_(torch.arange(k * abreast, (k + 1) * abreast))
        start = time.perf_counter()
        total = aggregator.add(total, message)
        seconds += time.perf_counter() - start
    folded, copied = (k + 1) * size / seconds, (before + copy_rate(buffers)) / 2
    return {
        "clients": (k + 1) * abreast,
        "abreast": abreast,
        "seconds": seconds,
        "folded": folded,
        "copied": copied,
        "share": folded / copied,
        "held": nbytes(aggregator.dump(total)[0]),
    }


def fold_seconds(abreast: int) -> list[float]:
    """Seconds of the processor, which other programs hardly stretch, that each of many messages takes."""
    pool = [adapters(SMOLLM2, abreast, 0, seed) for seed in range(max(2, 64 // abreast))]
    mean, seconds = Mean(), []
    total = mean.zero()
    for _ in range(max(1, 640 // (abreast * len(pool)))):
        for message in pool:
            start = time.process_time()
            total = mean.add(total, message)
            seconds.append(time.process_time() - start)
    return seconds


def ratio(other: Path, abreast: int, threads: int, turns: int = 8) -> dict[str, float]:
    """This package's seconds a message over another checkout's: each the median, and least, of runs in turn."""
    here = Path(__file__).resolve().parents[1]
    seconds: dict[Path, list[float]] = {here: [], other: []}
    for turn in range(2 * turns):
        root = (here, other)[(turn + turn // 2) % 2]  # neither is always first
        command = [sys.executable, __file__, f"--threads={threads}", f"--fold={abreast}"]
        env = {**os.environ, "PYTHONPATH": str(root / "src")}
        seconds[root] += json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
    measures = {"median": statistics.median, "least": min}
    return {name: of(seconds[here]) / of(seconds[other]) for name, of in measures.items()}


def close(what: str, m: int, n: int, clients: int, threads: int) -> dict[str, float]:
    """Seconds of closing one layer of a 7B model, and by how many bytes the process grew meanwhile."""
    torch.set_num_threads(threads)
    torch.linalg.svd(torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).R)
    message = adapters({"layer": (m, n, RANK_7B)}, clients, 0, 1)
    g = torch_generator(2)
    shared = {"layer.lora_A": torch.randn(RANK_7B, n, generator=g), "layer.lora_B": torch.zeros(m, RANK_7B)}
    aggregator = FedEx(2.0)
    total = aggregator.add(aggregator.zero(), message)
    before = peak_bytes(anew=True)
    start = time.perf_counter()
    if what == "FedEx":
        change, metrics = aggregator.close(total, Shared.of_flat(shared))
        told = metrics["deviation"]
        assert change.patch
    else:
        share_C = message.weight_C / message.weight_C.sum()
        A_Crn = shared["layer.lora_A"].double() + message.tensors["layer.lora_A"].double()
        B_Cmr = (shared["layer.lora_B"].double() + message.tensors["layer.lora_B"].double()) * share_C[:, None, None]
        left, right = B_Cmr.transpose(0, 1).flatten(1), A_Crn.flatten(0, 1)
        (B, A), lost = best((left, right), RANK_7B)
        told = lost / float(torch.linalg.vector_norm(B @ A).square() + lost**2) ** 0.5
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak_bytes() - before, "told": told}


def peak_bytes(*, anew: bool = False) -> int:
    """The most memory this process has held at once, since its start or since it was asked ``anew`` (Linux)."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def draw(rows: list[dict], path: Path) -> None:
    """Share of the copy by clients a message."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="clients a message", ylabel="share of a plain copy", xscale="log", ylim=(0, 1))
    axes.plot([row["abreast"] for row in rows], [row["share"] for row in rows], "o-", label="Mean, 135M adapter")
    axes.axhline(0.5, color="grey", linestyle=":")
    axes.set_xticks([row["abreast"] for row in rows], [str(row["abreast"]) for row in rows])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print both tables, or run one close for the process that asked."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--quick", action="store_true", help="fewer clients and shapes")
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--close", nargs=4, metavar=("WHAT", "M", "N", "CLIENTS"), help=argparse.SUPPRESS)
    ask.add_argument("--fold", type=int, metavar="ABREAST", help=argparse.SUPPRESS)
    ask.add_argument("--against", type=Path, metavar="CHECKOUT", help="fold beside another checkout")
    args = ask.parse_args()
    if args.fold:
        torch.set_num_threads(args.threads)
        print(json.dumps(fold_seconds(args.fold)))
        return
    if args.against:
        for abreast in (1, 8, 64):
            found = ratio(args.against.resolve(), abreast, args.threads)
            print(f"{abreast:>3} a message: median {found['median']:.3f}, least {found['least']:.3f}", flush=True)
        return
    if args.close:
        what, *sizes = args.close
        print(json.dumps(close(what, *map(int, sizes), threads=args.threads)))
        return
    torch.set_num_threads(args.threads)
    source = torch.ones(2**26 if args.quick else 2**27)
    buffers = source, torch.empty_like(source).fill_(0)
    size = nbytes(adapters(SMOLLM2, 1, 0, 0).tensors)
    print(f"{args.threads} threads; {size / 1e6:.2f} MB a client; copy_ of one {source.nbytes >> 20} MB buffer")
    print(
        f"{'':6}{'a message':>10}{'clients':>9}{'seconds':>9}{'GB/s':>7}{'copy_ GB/s':>12}{'share':>7}{'total MB':>10}"
    )
    curve = []
    clients, few = (1000, 80) if args.quick else (10_000, 640)
    for name, aggregator, abreast, count in [
        *(("Mean", Mean(), abreast, clients) for abreast in (1, 8, 16, 32, 64)),
        ("FedIT", LowRank(), 8, few // 2),
        ("FedIT", LowRank(), 8, few),
    ]:
        row = fold(aggregator, abreast, count, buffers)
        curve += [row] if name == "Mean" else []
        print(
            f"{name:6}{abreast:>10}{row['clients']:>9}{row['seconds']:>9.2f}{row['folded'] / 1e9:>7.2f}"
            f"{row['copied'] / 1e9:>12.2f}{row['share']:>7.2f}{row['held'] / 1e6:>10.1f}",
            flush=True,
        )
    draw(curve, Path(__file__).with_suffix(".png"))
    print(
        f"\nrank {RANK_7B}; a model is {LAYERS_7B} x 2 layers of the first shape, or x 7: 4 of it and 3 of the second"
    )
    print(f"{'':10}{'layer':>14}{'clients':>9}{'seconds':>9}{'peak MB':>9}{'lost':>9}{'32 x 2 s':>10}{'32 x 7 s':>10}")
    for what in ("FedEx", "best 16"):
        for C in (8,) if args.quick else (8, 64):
            model = 0.0
            for m, n in SHAPES_7B:
                command = [
                    sys.executable,
                    __file__,
                    f"--threads={args.threads}",
                    "--close",
                    what,
                    f"{m}",
                    f"{n}",
                    f"{C}",
                ]
                row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                first = (m, n) == SHAPES_7B[0]
                model += LAYERS_7B * (4 if first else 3) * row["seconds"]
                told = f"{LAYERS_7B * 2 * row['seconds']:>10.0f}{'':>10}" if first else f"{'':>10}{model:>10.0f}"
                print(
                    f"{what:10}{f'{m} x {n}':>14}{C:>9}{row['seconds']:>9.2f}{row['bytes'] / 1e6:>9.0f}"
                    f"{row['told']:>9.1e}{told}",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
