"""What does it cost to grow: ten times the clients, the rank, the model?

Random Llamas and random rows of 8 to 32 tokens; every client takes one AdamW step of four rows, the
exact mean is taken, nothing else is kept. Every point is a process of its own, so that its peak memory
is its own. The rank and the model grow with eight clients, the clients on a small model.

Run it: ``python benchmarks/growth.py [--quick]``

Legend: C clients.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

SHAPES = {
    # hidden, intermediate, layers, heads, key and value heads, vocabulary
    "0.2m": (64, 160, 3, 4, 2, 512),
    "13m": (192, 512, 16, 3, 1, 16384),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.2b": (2048, 8192, 16, 32, 8, 65536),
}
CLIENTS = (10, 100, 1_000, 10_000)
RANKS = (4, 16, 64)
MODELS = ("13m", "135m", "1.2b")


def cohort_of(shape: str, rank: int) -> Any:
    """A random model of this shape with LoRA on q and v."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lichen.models.adapters.lora import Lora
    from lichen.models.causal_cohort import CausalCohort

    hidden, inner, layers, heads, pairs, words = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        vocab_size=words,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    adapter = Lora(targets=("q_proj", "v_proj"), rank=rank, alpha=16)
    return CausalCohort(model, adapter=adapter, name=shape, reference=False, prove=False)


def measure(shape: str, clients: int, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds a client's step and peak memory."""
    from lichen.allocator import keep_large_buffers
    from lichen.clients.training.gradient_steps import Clip
    from lichen.clients.training.optimize import ClientOptimizer
    from lichen.clients.training.train import Train
    from lichen.core.collecting.collect import drain
    from lichen.core.contracts.client import ClientTask
    from lichen.core.message import Job
    from lichen.core.store import ClientStore
    from lichen.data.batches.rows import Ragged, TextShard
    from lichen.data.batches.shards import TrainSource
    from lichen.engines.block_size import AutoBlockSize
    from lichen.engines.local import LocalEngine
    from lichen.research.roster import Roster
    from lichen.server.mean import Mean

    keep_large_buffers()
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], rng.integers(8, 33, 4 * clients).cumsum()])
    rows = Ragged(rng.integers(3, SHAPES[shape][5], int(offsets[-1]), dtype=np.int32), offsets)
    roster = Roster(TextShard(rows, labels=rows, kind="lm"), np.arange(0, 4 * clients + 1, 4))
    cohort = cohort_of(shape, rank)
    source = TrainSource(roster, batch_size=4, steps=1, fixed_width=32)
    work = Train(cohort, optimizer=ClientOptimizer("adamw", lr=1e-3), gradient_steps=(Clip(1.0),))
    seconds = []
    with TemporaryDirectory() as folder:
        engine = LocalEngine(
            {"train": ClientTask(work=work, source=source)}, ClientStore(Path(folder)), block_size=AutoBlockSize(None)
        )
        shared = cohort.init(0)
        for version in range(rounds):
            begin, aggregator = time.perf_counter(), Mean()
            total = aggregator.zero()
            job = Job(work="train", shared=shared, version=version, clients=tuple(range(clients)), seed=version)
            for message in drain(engine, job):
                total = aggregator.add(total, message)
            aggregator.close(total, shared)
            seconds.append(time.perf_counter() - begin)
    return {
        "model": shape,
        "clients": clients,
        "rank": rank,
        "ms a client-step": round(1000 * min(seconds) / clients, 2),
        "tokens/s": round(int(offsets[-1]) / min(seconds)),
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    """Measure every point and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the two largest points")
    parser.add_argument("--one", nargs=4, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        shape, *numbers = asked.one
        print(json.dumps(measure(shape, *map(int, numbers))))
        return
    points = [("0.2m", c, 8, 2) for c in CLIENTS] + [("135m", 8, r, 2) for r in RANKS] + [(m, 8, 8, 2) for m in MODELS]
    if asked.quick:
        points = [p for p in points if p[1] < 10_000 and p[0] != "1.2b"]
    found = []
    for point in points:
        command = [sys.executable, __file__, "--one", *map(str, point)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print("| " + " | ".join(str(x) for x in found[-1].values()) + " |", flush=True)
    draw(found[: len([p for p in points if p[0] == "0.2m"])])


def draw(found: list[dict[str, Any]]) -> None:
    """Time and memory over the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axis, name in zip(axes, ("ms a client-step", "peak MiB"), strict=True):
        axis.plot([p["clients"] for p in found], [p[name] for p in found], marker="o", color="#2a6f4e")
        axis.set(xscale="log", xlabel="clients a round", title=name, ylim=(0, None))
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
