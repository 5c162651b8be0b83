"""Lichen itself, and plain training of one adapter, on a workload that ``workload.py`` knows; one JSON line.

*lichen*: two or more rounds of all clients through the local engine, their exact mean after each.
*central*: one adapter on everybody's rows, through the same kernels, as many rows a step as a block of
clients has together. It is what no federation can beat.

Run it: ``python benchmarks/contestant.py lichen --workload chat [--dtype bfloat16] [--padded] [--block 8]``

Legend: C clients, B rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import workload

from lichen.allocator import keep_large_buffers
from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.model import Batch
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.engines.block_size import AutoBlockSize
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.parts import trainer
from lichen.server.mean import Mean


@dataclass(frozen=True)
class Pooled:
    """Blocks of clients as one client each: their rows one below the other, in the same steps."""

    source: Source
    blocks: Sequence[Sequence[int]]

    def shape(self, client: int) -> Hashable:
        return self.source.shape(self.blocks[client][0])

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        (client,) = clients
        for batch in self.source.batches(self.blocks[client], seed):
            rows = {name: x.flatten(0, 1)[None] for name, x in batch.items() if name != "active_C"}
            yield {**rows, "active_C": batch["active_C"].any()[None]}


def main() -> None:
    """Run rounds and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contestant", choices=("lichen", "central"))
    parser.add_argument("--workload", choices=workload.NAMES, default="chat")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--padded", action="store_true", help="the padded reference, one client a call")
    parser.add_argument("--block", type=int, default=None, help="clients side by side; not given: measured")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    keep_large_buffers()
    packing = "false" if asked.padded else "true"
    work = workload.load(asked.workload, f"model.dtype={asked.dtype}", f"engine.packing={packing}")
    experiment, fed = work.loaded.experiment, work.recipe.federation
    train = trainer(experiment.server, workload.LR)
    source: Any = experiment.training(experiment.clients.train, batch=fed.batch_size, steps=fed.local_steps)
    shared, everyone = experiment.start.trainable, tuple(range(workload.CLIENTS))
    job = Job(work="train", shared=Shared.of_flat(shared), version=0, clients=everyone, seed=0)
    block = asked.block or AutoBlockSize(None)(job, ClientTask(work=train, source=source))
    clients: tuple[int, ...] = everyone
    if asked.contestant == "central":
        source = Pooled(source, [everyone[i : i + block] for i in range(0, len(everyone), block)])
        clients, width = tuple(range(len(source.blocks))), 1
    else:
        width = block
    aggregator, seconds, losses = Mean(), [], []
    with TemporaryDirectory() as folder:
        engine = LocalEngine(
            {"train": ClientTask(work=train, source=source)}, ClientStore(Path(folder)), block_size=width
        )
        for version in range(asked.rounds):
            begin, total, loss, count = time.perf_counter(), aggregator.zero(), 0.0, 0.0
            seed = derive(0, "round", version)
            for message in drain(
                engine, Job(work="train", shared=Shared.of_flat(shared), version=version, clients=clients, seed=seed)
            ):
                total = aggregator.add(total, message)
                loss, count = _sums(message.metrics, loss, count)
            change, _ = aggregator.close(total, Shared.of_flat(shared))
            shared = trees.add(shared, change.flat())
            seconds.append(time.perf_counter() - begin)
            losses.append(loss / count)
    print(json.dumps(_line(asked, work, block, seconds, losses)))


def _sums(metrics: Any, loss: float, count: float) -> tuple[float, float]:
    return loss + float(metrics["loss_sum"].sum()), count + float(metrics["count"].sum())


def _line(
    asked: argparse.Namespace, work: workload.Workload, block: int, seconds: Sequence[float], losses: Sequence[float]
) -> dict[str, Any]:
    steady = statistics.median(seconds[1:] or seconds)
    age: Callable[[], float] = lambda: time.time() - psutil.Process().create_time()  # noqa: E731
    return {
        "contestant": asked.contestant + (" padded" if asked.padded else ""),
        "workload": asked.workload,
        "dtype": asked.dtype,
        "block": block,
        "round_s": [round(s, 2) for s in seconds],
        "first_s": round(seconds[0], 2),
        "steady_s": round(steady, 2),
        "tokens": work.tokens,
        "tokens_per_s": round(work.tokens / steady, 1),
        "loss": [round(x, 6) for x in losses],
        "whole_s": round(age(), 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    main()
