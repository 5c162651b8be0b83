"""How far does a packed run drift from the padded reference?

A short federated run of SmolLM2-135M on real chat rows, packed and padded, in float32 from the same
start: after each round the distance of the shared adapters and of the losses.

Run it: ``python benchmarks/drift.py [--rounds 3] [--clients 4]``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import workload

from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.parts import trainer
from lichen.server.mean import Mean


def rounds(packing: bool, count: int, clients: int) -> list[tuple[Tree, float]]:
    """The shared tensors and the loss after every round."""
    work = workload.load("chat", f"engine.packing={str(packing).lower()}")
    experiment, fed = work.loaded.experiment, work.recipe.federation
    source = experiment.training(experiment.clients.train[:clients], batch=fed.batch_size, steps=fed.local_steps)
    shared, out = experiment.start.trainable, []
    with TemporaryDirectory() as folder:
        client_task = ClientTask(work=trainer(experiment.server, workload.LR), source=source)
        engine = LocalEngine({"train": client_task}, ClientStore(Path(folder)), block_size=8)
        for version in range(count):
            total, loss, seen = Mean().zero(), 0.0, 0.0
            job = Job(
                work="train",
                shared=Shared.of_flat(shared),
                version=version,
                clients=tuple(range(clients)),
                seed=version,
            )
            for message in drain(engine, job):
                total = Mean().add(total, message)
                loss += float(message.metrics["loss_sum"].sum())
                seen += float(message.metrics["count"].sum())
            shared = trees.add(shared, Mean().close(total, Shared.of_flat(shared))[0].flat())
            out.append((shared, loss / seen))
    return out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    asked = parser.parse_args()
    padded, packed = (rounds(packing, asked.rounds, asked.clients) for packing in (False, True))
    print("| round | distance of the adapters, relative | loss, relative |\n|---:|---:|---:|")
    for number, ((a, loss_a), (b, loss_b)) in enumerate(zip(padded, packed, strict=True), 1):
        flat_a, flat_b = (torch.cat([t[name].flatten().double() for name in sorted(t)]) for t in (a, b))
        change, loss = float((flat_a - flat_b).norm() / flat_a.norm()), abs(loss_a - loss_b) / loss_a
        print(f"| {number} | {change:.1e} | {loss:.1e} |")


if __name__ == "__main__":
    main()
