"""What FixMatch and FlexMatch add to five labels a client, over five seeds of the handwritten digits.

Twelve clients have 105 digits each, five of them with a label. Thirty rounds of the labels alone are the start; twelve
more follow, by the labels alone or with unlabelled rows. Accuracy on 537 other digits is kept in ``results/semi.json``,
and printed as mean and sample deviation.

    python benchmarks/semi.py
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import tables
import torch

from lichen.clients.training.fixmatch import FixMatch
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask, ClientWork, Source
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.augment_images import ImageViews, Pixels
from lichen.data.batches.scarce_labels import ScarceLabels, hide
from lichen.data.batches.shards import ArrayShard, TrainSource
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.server.mean import Mean

CLIENTS, ROWS, LABELS, SEEDS = 12, 105, 5, range(5)


def rounds(start: Tree, work: ClientWork, source: Source, numbers: range) -> Tree:
    """Shared tensors after rounds of plain averaging."""
    shared, mean = Shared(start), Mean()
    with tempfile.TemporaryDirectory() as folder:
        engine = LocalEngine({"train": ClientTask(work=work, source=source)}, ClientStore(Path(folder)))
        for version in numbers:
            everyone = tuple(range(CLIENTS))
            job = Job(work="train", shared=shared, version=version, clients=everyone, seed=version)
            total = mean.zero()
            for message in drain(engine, job):
                total = mean.add(total, message)
            change = mean.close(total, shared)[0].trainable
            shared = Shared({name: x + change[name].to(x.dtype) for name, x in shared.trainable.items()})
    return dict(shared.trainable)


def accuracies(seed: int) -> dict[str, float]:
    """By method."""
    records = load_records("digits")
    order = np.random.default_rng(seed).permutation(len(records))
    x = np.stack([np.asarray(records[i].features).reshape(64) for i in order])
    y = np.array([int(records[i].label) for i in order])
    parts = [slice(c * ROWS, (c + 1) * ROWS) for c in range(CLIENTS)]
    local = [hide(ArrayShard(x=x[p], labels=y[p]), LABELS, seed=seed, client=c) for c, p in enumerate(parts)]
    few = [replace(s, x=s.x[s.labels >= 0], labels=s.labels[s.labels >= 0]) for s in local]
    alone = TrainSource(few, batch_size=5, steps=3)
    both = ScarceLabels(TrainSource(local, batch_size=5, steps=3), unlabelled_rows=50)
    model = ImageMLP(64, hidden=(64,), classes=10)
    labels = Train(model, optimizer=ClientOptimizer("sgd", lr=0.2))
    views = ImageViews(side=8, weak=Pixels(), strong=Pixels(rotate=15, gain=0.2))
    own = {"rows": ROWS, "unlabelled": [ROWS - LABELS] * CLIENTS}
    start = rounds(model.init(seed), labels, alone, range(30))
    after = range(30, 42)
    ways = {
        "labels alone": rounds(start, labels, alone, after),
        "FixMatch": rounds(start, FixMatch(labels, views), both, after),
        "FlexMatch": rounds(start, FixMatch(labels, views, **own), both, after),
        "FlexMatch, λ = 0.3": rounds(start, FixMatch(labels, views, weight=0.3, **own), both, after),
    }
    held_x, held_y = torch.from_numpy(x[CLIENTS * ROWS :]), torch.from_numpy(y[CLIENTS * ROWS :])
    return {
        name: float((model.apply(shared, held_x).argmax(-1) == held_y).double().mean()) for name, shared in ways.items()
    }


def main() -> None:
    """Run every seed and print the table."""
    found = []
    for seed in SEEDS:
        found.append(accuracies(seed))
        print(f"seed {seed}", flush=True)
    (tables.RESULTS / "semi.json").write_text(json.dumps(found, indent=1) + "\n")
    tables.semi()


if __name__ == "__main__":
    main()
