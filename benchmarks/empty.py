"""What does a client cost when it has nothing to do?

A round of 10,000 clients whose work is empty: no training, a message of one tensor of four numbers.
What is left is the house itself: blocks, batches, messages, byte counts and the exact sum. Cases:

* ``nothing``: no rows at all.
* ``no step``: text rows, of which the block's shape is asked, and no step.
* ``one step``: one batch of one row is drawn, cut, padded and handed over.
* ``private``: private state of four numbers read and written, a file a client.

``python benchmarks/empty.py`` prints microseconds a client (processor time of the one thread, best of
three rounds) by block size and draws ``empty.png``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask, Source
from lichen.core.contracts.model import Batch
from lichen.core.expected import COUNT, Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.rows import Ragged, TextShard
from lichen.data.batches.shards import TrainSource
from lichen.engines.local import LocalEngine
from lichen.research.roster import Roster
from lichen.server.mean import Mean

BLOCKS = (1, 8, 64, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """A client work that does nothing, and keeps private state where asked to."""

    private: bool

    def expected(self, job: Job) -> Expected:
        """The one tensor."""
        return Expected(group="empty", tensors={"x": TensorSpec((4,))}, metrics={"count": COUNT}, weight=(1.0, 1.0))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> tuple[Job, tuple[int, ...]]:
        """Who they are."""
        return job, tuple(clients)

    def step(self, state: tuple[Job, tuple[int, ...]], batch: Batch) -> tuple[Job, tuple[int, ...]]:
        """The same."""
        return state

    def final(self, state: tuple[Job, tuple[int, ...]]) -> tuple[Message, Tree | None]:
        """One small tensor a client."""
        job, clients = state
        one_C = torch.ones(len(clients), dtype=torch.float64)
        message = Message(
            group="empty",
            client_C=torch.tensor(clients),
            version_C=torch.full((len(clients),), job.version),
            tensors={"x": torch.ones(len(clients), 4)},
            weight_C=one_C,
            metrics={"count": one_C},
        )
        return message, {"x": torch.ones(len(clients), 4)} if self.private else None


@dataclass(frozen=True, slots=True)
class NoRows:
    """A source without batches."""

    def shape(self, client: int) -> Hashable:
        """All alike."""
        return ()

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """None."""
        return iter(())


def text(clients: int, *, steps: int) -> Source:
    """Two rows of five tokens a client."""
    ids = Ragged(np.arange(clients * 10, dtype=np.int32), np.arange(clients * 2 + 1) * 5)
    rows = TextShard(ids, labels=ids, kind="lm")
    return TrainSource(Roster(rows, np.arange(clients + 1) * 2), batch_size=1, steps=steps)


def microseconds(source: Source, clients: int, block: int, *, private: bool) -> float:
    """Processor time a client, best of three rounds."""
    took = []
    with tempfile.TemporaryDirectory() as folder:
        client_task = ClientTask(work=Nothing(private=private), source=source)
        engine = LocalEngine({"empty": client_task}, ClientStore(Path(folder)), block_size=block)
        for version in range(3):
            start, mean = time.process_time(), Mean()
            total = mean.zero()
            everyone = tuple(range(clients))
            for message in drain(
                engine,
                Job(
                    work="empty", shared=Shared({"x": torch.zeros(4)}), version=version, clients=everyone, seed=version
                ),
            ):
                total = mean.add(total, message)
            change, _ = mean.close(total, Shared())
            took.append((time.process_time() - start) / clients * 1e6)
            assert torch.equal(change.trainable["x"], torch.ones(4, dtype=torch.float64))
    return min(took)


def main() -> None:
    """Print the table and draw it."""
    reads = argparse.ArgumentParser(description=__doc__)
    reads.add_argument("--clients", type=int, default=10_000)
    reads.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"))
    chosen = reads.parse_args()
    torch.set_num_threads(1)
    cases: dict[str, tuple[Callable[[int], Source], bool]] = {
        "nothing": (lambda _: NoRows(), False),
        "no step": (lambda n: text(n, steps=0), False),
        "one step": (lambda n: text(n, steps=1), False),
        "private": (lambda _: NoRows(), True),
    }
    print(f"{'block':8}" + "".join(f"{block:>9}" for block in BLOCKS) + "   (µs a client)")
    found: dict[str, list[float]] = {}
    for name, (source, private) in cases.items():
        count = chosen.clients // 10 if private else chosen.clients
        found[name] = [microseconds(source(count), count, block, private=private) for block in BLOCKS]
        print(f"{name:8}" + "".join(f"{value:9.1f}" for value in found[name]), flush=True)
    draw(found, chosen.plot)


def draw(found: dict[str, list[float]], file: Path) -> None:
    """Microseconds a client by block size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, values in found.items():
        axes.plot(BLOCKS, values, marker="o", label=name)
    axes.axhline(50, color="grey", linestyle=":", label="50 µs")
    axes.set(xscale="log", yscale="log", xlabel="clients side by side", ylabel="µs a client")
    axes.set_xticks(BLOCKS, [str(block) for block in BLOCKS])
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
