"""Does a roster of a million clients cost more than one of a thousand?

A random Llama of one layer; every client holds one to three rows of 4 to 12 random tokens, in files
that are mapped into memory. Three rounds: 1,000 clients are drawn, each takes one step of LoRA, and
the exact mean is taken; beside it each of them tunes a private adapter that is kept on disk. Every
roster is measured in a process of its own.

``python benchmarks/roster.py`` prints processor seconds (one thread) and memory by roster size, and draws
``roster.png``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lichen.core.collecting.collect import drain
from lichen.core.seeds import derive, numpy_generator

ROSTERS = (1_000, 10_000, 100_000, 1_000_000)
COHORT, ROUNDS, WORDS = 1_000, 3, 64


def write_roster(folder: Path, clients: int) -> None:
    """Random rows of so many clients as flat files."""
    rng = numpy_generator(0, "roster")
    rows_N = rng.integers(1, 4, clients)
    length_R = rng.integers(4, 13, int(rows_N.sum()))
    np.save(folder / "client_offsets.npy", np.concatenate([[0], rows_N.cumsum()]))
    np.save(folder / "row_offsets.npy", np.concatenate([[0], length_R.cumsum()]))
    np.save(folder / "tokens.npy", rng.integers(0, WORDS, int(length_R.sum()), dtype=np.int32))


def open_roster(folder: Path) -> Any:
    """The roster of those files, mapped."""
    from lichen.data.batches.rows import Ragged, TextShard
    from lichen.research.roster import Roster

    tokens, rows, clients = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "row_offsets", "client_offsets")
    )
    ids = Ragged(tokens, rows)
    return Roster(TextShard(ids, labels=ids, kind="lm"), clients)


def small_model() -> Any:
    """A random Llama with LoRA for cohorts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lichen.models.adapters.lora import Lora
    from lichen.models.causal_cohort import CausalCohort

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    lora = Lora(targets=("q_proj", "v_proj"), rank=2, alpha=4)
    return CausalCohort(model.requires_grad_(False).eval(), adapter=lora, name="small")


def measure(folder: Path) -> dict[str, float]:
    """Processor seconds of opening, drawing, a shared and a private round; memory before and at most."""
    import torch

    from lichen.algorithms.average import Average
    from lichen.clients.training.train import Train
    from lichen.core.contracts.client import ClientTask
    from lichen.core.message import Job
    from lichen.core.store import ClientStore
    from lichen.data.batches.shards import TrainSource
    from lichen.engines.local import LocalEngine
    from lichen.server.mean import Mean
    from lichen.server.optimize import ServerSGD
    from lichen.server.sampling import Uniform

    torch.set_num_threads(1)
    model = small_model()
    before = resident_bytes()
    start = time.process_time()
    roster = open_roster(folder)
    opening = time.process_time() - start
    source = TrainSource(roster, batch_size=2, steps=1)
    client_tasks = {
        "train": ClientTask(work=Train(model), source=source),
        "own": ClientTask(work=Train(model, personal=True), source=source),
    }
    engine = LocalEngine(client_tasks, ClientStore(folder / "private"), base=model.base, block_size=64)
    average = Average(
        aggregator=Mean(),
        optimizer=ServerSGD(),
        sampler=Uniform(COHORT),
        weight_N=torch.from_numpy(roster.size_N),
        rounds=ROUNDS,
        valid=None,
        base=model.base,
    )
    state, seed = average.init(model.init(0)), 0
    drawing, shared, private = [], [], []
    for _ in range(ROUNDS):
        seed = derive(seed, "round")
        start = time.process_time()
        average.sampler.invite(average.weight_N, seed)
        drawing.append(time.process_time() - start)
        start = time.process_time()
        state, report = average.round(state, engine, seed)
        shared.append(time.process_time() - start)
        start = time.process_time()
        job = Job(
            work="own", shared=state.shared, version=state.round, clients=report.clients, seed=seed, base=model.base
        )
        assert sum(message.client_C.shape[0] for message in drain(engine, job)) == COHORT
        private.append(time.process_time() - start)
    return {
        "open": opening,
        "draw": min(drawing),
        "shared round": min(shared),
        "private round": min(private),
        "files MB": sum(f.stat().st_size for f in folder.glob("*.npy")) / 1e6,
        "before MB": before / 1e6,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure every roster in a process of its own, print the table and draw it."""
    reads = argparse.ArgumentParser(description=__doc__)
    reads.add_argument("--rosters", type=int, nargs="*", default=ROSTERS)
    reads.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    reads.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"))
    chosen = reads.parse_args()
    if chosen.folder:
        print(json.dumps(measure(chosen.folder)))
        return
    found: dict[int, dict[str, float]] = {}
    for clients in chosen.rosters:
        with tempfile.TemporaryDirectory() as folder:
            write_roster(Path(folder), clients)
            command = [sys.executable, __file__, "--folder", folder]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[clients] = json.loads(said.splitlines()[-1])
        if len(found) == 1:
            print(f"{'roster':>9} " + " ".join(f"{name:>13}" for name in found[clients]))
        print(f"{clients:>9} " + " ".join(f"{value:13.3f}" for value in found[clients].values()), flush=True)
    draw(found, chosen.plot)


def draw(found: dict[int, dict[str, float]], file: Path) -> None:
    """Peak memory and seconds of a round by roster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    sizes = list(found)
    left.plot(sizes, [about["peak MB"] for about in found.values()], marker="o", label="peak")
    left.plot(sizes, [about["before MB"] for about in found.values()], marker="o", label="before any client")
    left.set(xscale="log", ylim=0, xlabel="clients", ylabel="MB")
    for name in ("shared round", "private round"):
        right.plot(sizes, [about[name] for about in found.values()], marker="o", label=name)
    right.set(xscale="log", ylim=0, xlabel="clients", ylabel="processor seconds, 1,000 taking part")
    for axes in (left, right):
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
