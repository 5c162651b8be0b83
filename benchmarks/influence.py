"""How well influences of rows tell wrong labels: DataInf, the exact inverse, and the row's own loss, on digits.

One client has 300 digits, of which a fifth have a wrong label, and 100 validation rows. A small network learns ten
epochs of them; then every row is ranked by what it does to the validation loss. The number is the area under the curve
(AUC): the chance that a row with a wrong label stands above one with the right one. Pixels are once as they are, all of
one sign, and once less their mean.

``python benchmarks/influence.py --run 0 1 2`` takes these seeds, seconds each, and keeps ``results/influence.json``;
``python benchmarks/influence.py`` prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from lichen import fl
from lichen.audit.row_scores import row_scores
from lichen.clients.evaluation.influence import influences
from lichen.clients.privacy.row_gradients import row_gradients
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel

RESULTS = Path(__file__).with_name("results") / "influence.json"
ROWS, VALID, WRONG = 300, 100, 0.2


def batches(shard: fl.ArrayShard) -> Iterator[Batch]:
    """All rows of one client, in order."""
    return fl.EvalSource((shard,), batch_size=64).batches((0,), 0)


def gradients(model: CohortModel, tensors: fl.Tree, shard: fl.ArrayShard) -> dict[str, torch.Tensor]:
    """Of every row, ``(N, numbers of a layer)``."""
    params_C = trees.broadcast(tensors, 1)
    parts = [found for batch in batches(shard) for _, found in row_gradients(model, params_C, {}, {}, batch)]
    return {name: x.double().flatten(1) for name, x in trees.concatenate(parts).items()}


def exact(own: dict[str, torch.Tensor], judged: dict[str, torch.Tensor]) -> np.ndarray:
    """The same with the inverse of the mean in place of the mean of inverses."""
    total = torch.zeros(ROWS, dtype=torch.float64)
    for name, g_ND in own.items():
        damping, v = g_ND.square().mean() / 10, judged[name].mean(0)
        gram = g_ND @ g_ND.T / ROWS + damping * torch.eye(ROWS, dtype=torch.float64)
        h = (v - g_ND.T @ torch.linalg.solve(gram, g_ND @ v) / ROWS) / damping
        total = total - g_ND @ h
    return total.numpy()


def run(seed: int, *, centred: bool) -> dict[str, float]:
    """AUC of each way to rank rows."""
    x, y = load_digits(return_X_y=True)
    x, rng = (x / 16).astype(np.float32), np.random.default_rng(seed)
    order = rng.permutation(len(y))
    own, judged = order[:ROWS], order[ROWS : ROWS + VALID]
    labels, wrong = y[own].copy(), rng.random(ROWS) < WRONG
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    x = x - x[own].mean(0) if centred else x
    rows, valid = fl.ArrayShard(x=x[own], labels=labels), fl.ArrayShard(x=x[judged], labels=y[judged])
    model = fl.ImageMLP(64, hidden=(32,), classes=10)
    train = fl.Train(model, optimizer=fl.ClientOptimizer(name="sgd", lr=0.1))
    source = fl.TrainSource((rows,), batch_size=16, steps=0, epochs=10)
    start = fl.Shared(model.init(seed))
    with tempfile.TemporaryDirectory() as folder:
        engine = fl.LocalEngine({"train": fl.ClientTask(work=train, source=source)}, fl.ClientStore(Path(folder)))
        number = engine.submit(fl.Job(work="train", shared=start, version=0, clients=(0,), seed=seed))
        (reply,) = engine.replies((number,))
    assert reply.message is not None
    shared = fl.Shared(trees.add(start.trainable, trees.take(reply.message.tensors, 0)))
    found = influences(model, shared, lambda: batches(rows), lambda: batches(valid)).numpy()
    inverse = exact(gradients(model, shared.trainable, rows), gradients(model, shared.trainable, valid))
    losses = -row_scores(model, shared.trainable, shared.fixed, batches(rows))["loss"]  # members' are low
    ranked = {"DataInf": found, "exact inverse": inverse, "the row's own loss": losses}
    return {name: float(roc_auc_score(wrong, scores)) for name, scores in ranked.items()}


def main() -> int:
    """Run seeds, or print the table of what was kept."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--run", nargs="+", type=int, metavar="SEED", help="measure anew")
    args = ask.parse_args()
    if args.run:
        worlds = {"as they are": False, "less their mean": True}
        found = {name: [run(seed, centred=on) for seed in args.run] for name, on in worlds.items()}
        RESULTS.write_text(json.dumps({"seeds": args.run, "auc": found}, indent=1) + "\n", encoding="utf-8")
    auc = json.loads(RESULTS.read_text(encoding="utf-8"))["auc"]
    names = list(next(iter(auc.values()))[0])
    print(f"| pixels | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for world, seeds in auc.items():
        print(f"| {world} | {' | '.join(' '.join(f'{one[name]:.2f}' for one in seeds) for name in names)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
