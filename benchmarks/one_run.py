"""Does the one-run audit of DP-SGD stay below the stated ε, and find noise that is missing or too small?

A canary has a feature of its own, so that one column of a linear student moves by it and by noise alone.

Run it: ``python benchmarks/one_run.py --out benchmarks/results/one-run.json``, then
``python benchmarks/one_run.py --show benchmarks/results/one-run.json``

Legend: M canaries, K classes, C clients, B rows, F features.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch

from lichen.audit.one_run import epsilon_at_least, guessed
from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.fold import fold
from lichen.core.message import Job
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.wire.shared import Shared
from lichen.data.batches.poisson_rows import PoissonRows
from lichen.data.batches.shards import ArrayShard, TrainSource
from lichen.models.students.students import ImageMLP

CANARIES, GUESSES, STEPS, EPSILON, DELTA = 600, 160, 4, 3.0, 1e-5
SIGMA = 2.79
"""Of four steps on all rows, for ε = 3 at δ = 1e-5; a test holds it to the accountant."""


def bound_of(seed: int, sigma: float) -> float:
    """The least ε that fits one run with this noise."""
    draw = np.random.default_rng(seed)
    included_M, label_M = draw.random(CANARIES) < 0.5, draw.integers(0, 2, CANARIES)
    rows_MF = (10 * np.eye(CANARIES, dtype=np.float32))[included_M]
    model = ImageMLP(CANARIES, hidden=(), classes=2, reference=False)
    local = TrainSource([ArrayShard(rows_MF, labels=label_M[included_M])], batch_size=CANARIES, steps=STEPS)
    secret = SecretRandomness.of_seed(seed)
    work = PrivateSteps(
        Train(model, optimizer=ClientOptimizer("sgd", lr=1.0), weigh_by="one"),
        clip=0.5,
        sigma=sigma,
        mean_rows_N=(CANARIES / 2,),
        randomness=secret,
    )
    source = PoissonRows(local, rate_N=(1.0,), randomness=secret, batch_rows=CANARIES)
    job = Job(work="train", shared=Shared(model.init(0)), version=0, clients=(0,), seed=seed)
    message, _ = fold(work, source.batches((0,), seed), job, (0,))
    (moved_KF,) = (x[0] for x in message.tensors.values() if x.dim() == 3)
    label = torch.from_numpy(label_M)
    own_M = moved_KF.gather(0, label[None])[0] - moved_KF.gather(0, 1 - label[None])[0]
    right = guessed(own_M, torch.from_numpy(included_M), GUESSES)
    return epsilon_at_least(GUESSES, right, canaries=CANARIES, delta=DELTA)


def main() -> None:
    """Run the audits, or print what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", type=Path)
    asked = parser.parse_args()
    if asked.show:
        found = json.loads(asked.show.read_text(encoding="utf-8"))
        print("| noise | runs | bound, median | least | most | above the stated 3 |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, some in found.items():
            above = sum(x > EPSILON for x in some)
            middle = statistics.median(some)
            print(f"| {name} | {len(some)} | {middle:.2f} | {min(some):.2f} | {max(some):.2f} | {above} |")
        return
    torch.set_num_threads(1)
    ways = {"as stated": (SIGMA, 100), "a quarter of it": (SIGMA / 4, 20), "none": (0.0, 20)}
    found = {name: [bound_of(seed, sigma) for seed in range(runs)] for name, (sigma, runs) in ways.items()}
    if asked.out:
        asked.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
