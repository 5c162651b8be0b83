"""One factor on a head's logits, chosen from sums of losses: the least loss, and no row at the server."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lichen.algorithms.scores import score
from lichen.clients.statistics.scale import SCALES, ScaleLosses, best_scale
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP

MLP = ImageMLP(6, hidden=(12,), classes=3)
HEAD = "layer1"


def shards(labelled: bool = True) -> list[ArrayShard]:
    rng = np.random.default_rng(0)
    out = []
    for rows in (30, 41, 12, 0):
        labels = rng.integers(0, 3, rows)
        x = (rng.normal(size=(rows, 6)) + np.eye(3, 6)[labels]).astype(np.float32)
        out.append(ArrayShard(x=x, labels=labels if labelled else np.full(rows, -100)))
    return out


def told(rows: list[ArrayShard], shared: Tree, tmp_path: object, block: int = 64) -> torch.Tensor:
    """Every client's losses, over an engine."""
    task = ClientTask(work=ScaleLosses(MLP), source=EvalSource(rows, batch_size=16, pad=0))
    engine = LocalEngine({"scale": task}, ClientStore(tmp_path), block_size=block)  # type: ignore[arg-type]
    job = Job(work="scale", shared=Shared(shared), version=0, clients=tuple(range(len(rows))), seed=0)
    return score(engine, job)[1]["losses"]


def times(shared: Tree, factor: float) -> Tree:
    return {name: x * factor if name.startswith(HEAD) else x for name, x in shared.items()}


def pooled_loss(rows: list[ArrayShard], shared: Tree) -> float:
    x = torch.from_numpy(np.concatenate([r.x for r in rows]))
    labels = torch.from_numpy(np.concatenate([r.labels for r in rows]))
    return float(torch.nn.functional.cross_entropy(MLP.apply(shared, x).double(), labels))


def oracle(rows: list[ArrayShard], shared: Tree) -> float:
    """The best of all factors on pooled rows: the loss is convex in it, so go where its slope changes sign."""
    x = torch.from_numpy(np.concatenate([r.x for r in rows]))
    labels_N1 = torch.from_numpy(np.concatenate([r.labels for r in rows]))[:, None]
    logits_NK, low, high = MLP.apply(shared, x).double(), -6.0, 6.0
    for _ in range(50):
        middle = (low + high) / 2
        chance_NK = (logits_NK * 2**middle).softmax(-1)
        rising = float((chance_NK * logits_NK).sum() - logits_NK.gather(1, labels_N1).sum()) > 0
        low, high = (low, middle) if rising else (middle, high)
    return float(2**high)


def learned() -> Tree:
    """A head that knows something."""
    rows, shared = shards(), MLP.init(0)
    x = torch.from_numpy(np.concatenate([r.x for r in rows]))
    y = torch.nn.functional.one_hot(torch.from_numpy(np.concatenate([r.labels for r in rows])), 3).float()
    hidden = torch.relu(x @ shared["layer0.weight"].T + shared["layer0.bias"])
    weight = torch.linalg.lstsq(hidden, y - 1 / 3).solution.T.contiguous()
    return {**shared, f"{HEAD}.weight": weight, f"{HEAD}.bias": torch.zeros(3)}


def test_it_is_the_factor_of_pooled_rows(tmp_path: object) -> None:
    rows, shared = shards(), learned()
    found = best_scale(told(rows, shared, tmp_path))
    assert found > 1.5
    assert abs(math.log2(found / oracle(rows, shared))) <= 1 / 16 + 1e-9
    least = pooled_loss(rows, times(shared, found))
    assert least < pooled_loss(rows, shared)
    for near in (2**-0.125, 2**0.125):
        assert pooled_loss(rows, times(shared, found * near)) >= least - 1e-12


def test_sums_are_those_of_each_clients_rows_in_blocks_of_any_size(tmp_path: object) -> None:
    rows, shared = shards(), learned()
    losses_NS = told(rows, shared, tmp_path)
    assert losses_NS.shape == (4, len(SCALES))
    for client, own in enumerate(rows[:3]):
        for at in (0, 48, 96):
            mean = pooled_loss([own], times(shared, SCALES[at]))
            assert float(losses_NS[client, at]) / own.size == pytest.approx(mean, rel=1e-5)
    assert not losses_NS[3].any()
    assert torch.equal(told(rows, shared, tmp_path, block=1), losses_NS)


def test_a_head_that_is_always_right_or_always_wrong_goes_to_the_ends() -> None:
    logits_NK = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    for labels_N, end in ((logits_NK.argmax(-1), 64.0), (logits_NK.argmin(-1), 1 / 64)):
        right_N1 = labels_N[:, None]
        losses = [-(logits_NK * s).log_softmax(-1).gather(1, right_N1).sum() for s in SCALES]
        assert best_scale(torch.stack(losses)[None]) == end


def test_without_a_label_there_is_nothing_to_choose_by(tmp_path: object) -> None:
    with pytest.raises(LichenError, match="no labelled row"):
        best_scale(told(shards(labelled=False), learned(), tmp_path))
