"""Influences are those of the mean of inverses, near those of the exact inverse, and find labels that are wrong."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import lichen
from lichen import fl
from lichen.cli import main
from lichen.clients.evaluation import influence as module
from lichen.clients.evaluation.influence import influences
from lichen.clients.privacy.row_gradients import row_gradients
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared


def batches(shard: fl.ArrayShard) -> Iterable[Batch]:
    return fl.EvalSource((shard,), batch_size=32).batches((0,), 0)


def gradients(model: CohortModel, shared: Shared, shard: fl.ArrayShard) -> dict[str, torch.Tensor]:
    params_C = trees.broadcast(shared.trainable, 1)
    parts = [g for batch in batches(shard) for _, g in row_gradients(model, params_C, {}, shared.fixed, batch)]
    return {name: x.double().flatten(1) for name, x in trees.concatenate(parts).items()}


def digits(count: int, *, wrong: float = 0.0, seed: int = 0) -> tuple[fl.ArrayShard, fl.ArrayShard, np.ndarray]:
    """``(training rows, validation rows, which labels are wrong)``."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    rows, valid = order[:count], order[count : count + 100]
    labels = y[rows].copy()
    bad = rng.random(count) < wrong
    labels[bad] = (labels[bad] + rng.integers(1, 10, bad.sum())) % 10
    # Pixels of one sign would give all gradients a direction in common, which hides the rest.
    x = (x / 16).astype(np.float32)
    x -= x[rows].mean(0)
    return fl.ArrayShard(x=x[rows], labels=labels), fl.ArrayShard(x=x[valid], labels=y[valid]), bad


def trained(shard: fl.ArrayShard, tmp_path: Path, *, epochs: int, width: int = 32) -> tuple[CohortModel, Shared]:
    model = fl.ImageMLP(64, hidden=(width,), classes=10)
    train = fl.Train(model, optimizer=fl.ClientOptimizer(name="sgd", lr=0.1))
    source = fl.TrainSource((shard,), batch_size=16, steps=0, epochs=epochs)
    engine = fl.LocalEngine({"train": fl.ClientTask(work=train, source=source)}, ClientStore(tmp_path))
    start = Shared(model.init(0))
    job = fl.Job(work="train", shared=start, version=0, clients=(0,), seed=1)
    (reply,) = engine.replies((engine.submit(job),))
    assert reply.message is not None
    return model, Shared(trees.add(start.trainable, trees.take(reply.message.tensors, 0)))


def inverses(own: dict[str, torch.Tensor], judged: dict[str, torch.Tensor], *, each: bool) -> torch.Tensor:
    """By the inverse of the mean, or by the mean of inverses, row by row and solved in full."""
    total = torch.zeros(len(next(iter(own.values()))), dtype=torch.float64)
    for name, g_ND in own.items():
        v = judged[name].mean(0)
        damped = g_ND.square().mean() / 10 * torch.eye(g_ND.shape[1], dtype=torch.float64)
        groups = g_ND[:, None] if each else g_ND[None]
        h = torch.stack([torch.linalg.solve(g.T @ g / len(g) + damped, v) for g in groups]).mean(0)
        total = total - g_ND @ h
    return total


@pytest.mark.parametrize("rows", [30, 1])
def test_they_are_those_of_inverses_row_by_row_and_of_one_row_the_exact_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    train, valid, _ = digits(30)
    model, shared = trained(train, tmp_path, epochs=2, width=4)
    some = fl.ArrayShard(x=train.x[:rows], labels=train.labels[:rows])
    monkeypatch.setattr(module, "_AT_ONCE", 4 * trees.nbytes(shared.trainable))  # rows in several parts
    found = influences(model, shared, lambda: batches(some), lambda: batches(valid))
    own, judged = gradients(model, shared, some), gradients(model, shared, valid)
    assert torch.allclose(found, inverses(own, judged, each=True), rtol=1e-8, atol=1e-10)
    assert torch.allclose(found, inverses(own, judged, each=False), rtol=1e-8, atol=1e-10) == (rows == 1)


def test_rows_with_wrong_labels_harm_most(tmp_path: Path) -> None:
    rows, valid, wrong = digits(300, wrong=0.2)
    model, shared = trained(rows, tmp_path, epochs=6)
    found = influences(model, shared, lambda: batches(rows), lambda: batches(valid)).numpy()
    assert roc_auc_score(wrong, found) > 0.85
    nothing = fl.ArrayShard(x=rows.x[:0], labels=rows.labels[:0])
    with pytest.raises(LichenError, match="no validation row"):
        influences(model, shared, lambda: batches(rows), lambda: batches(nothing))


def test_the_command_writes_a_private_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        x, y = load_digits(return_X_y=True)
        for at in range(120):
            row = {"client": f"=c{at % 2}", "numbers": (x[at] / 16).tolist(), "label": str(y[at])}
            file.write(json.dumps(row) + "\n")
    recipe = {
        "task": "classify",
        "model": {"student": {"kind": "image-mlp", "width": 8}},
        "data": {"name": str(tmp_path / "rows.jsonl"), "valid": 0.2, "test": 0.2, "min_rows": 1},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "federation": {"rounds": 2, "local_steps": 4, "batch_size": 8, "aggregate": "mean"},
        "compare": {"baselines": []},
    }
    run = tmp_path / "run"
    lichen.run(recipe, out=run)
    assert main(["influence", str(run)]) == 0
    assert "training rows raise the loss" in capsys.readouterr().out
    lines = list(csv.DictReader((run / "influence.csv").read_text().splitlines()))
    values = [float(line["influence"]) for line in lines]
    assert values == sorted(values, reverse=True)
    assert {line["client"] for line in lines} == {"'=c0", "'=c1"}
    assert (run / "influence.csv").stat().st_mode & 0o77 == 0
    assert main(["influence", str(run), "--client", "=c1", "--out", str(tmp_path / "own.csv"), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["rows"]
    both = {(line["row"], line["label"], line["influence"]) for line in lines if line["client"] == "'=c1"}
    assert {(str(row["row"]), row["label"], repr(row["influence"])) for row in own} == both
    assert main(["influence", str(run), "--client", "nobody"]) == 2
    assert "no client is called" in capsys.readouterr().err
