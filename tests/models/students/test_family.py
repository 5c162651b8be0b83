"""What training needs is counted: against the tensors that real training holds, and as a choice that fits.

Legend: C clients, B rows.
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.tree import nbytes
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource
from lichen.models.students.family import family, largest_fitting, need
from lichen.models.students.student import Student
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer


def pixels(rows: int = 32, features: int = 64) -> TrainSource:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, features)).astype(np.float32)
    return TrainSource((ArrayShard(x, labels=rng.integers(0, 10, 64)),), batch_size=rows, steps=3)


def words(rows: int = 16) -> TrainSource:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 200, 24) for _ in range(40)]
    shard = TextShard(ids, labels=rng.integers(0, 3, 40), kind="classify")
    return TrainSource((shard,), batch_size=rows, steps=3, width_multiple=8)


MODELS: dict[str, tuple[Student, TrainSource]] = {
    "mlp": (ImageMLP(64, hidden=(256, 128), classes=10), pixels()),
    "mlp-many-rows": (ImageMLP(64, hidden=(32,), classes=10), pixels(rows=512)),
    "cnn": (ImageCNN(8, width=8, classes=10), pixels()),
    "text-cnn": (TextCNN(200, width=16, classes=3), words()),
    "transformer": (TwoLayerTransformer(200, width=32, classes=3, max_length=32), words()),
}


def first(source: TrainSource) -> Batch:
    return next(source.batches((0,), 0))


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_a_real_pass_keeps(name: str) -> None:
    model, source = MODELS[name]
    batch = first(source)
    params = {n: x.requires_grad_() for n, x in model.init(0).items()}
    inputs = [batch[n][0] for n in model.inputs]
    known = {x.untyped_storage().data_ptr() for x in (*params.values(), *inputs)}
    kept: dict[int, int] = {}
    held = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        held.append(x)  # no storage is freed, so that no two share an address
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = model.apply(params, *inputs)
        nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")
    assert need(model, batch).activations == pytest.approx(sum(kept.values()), rel=0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_what_training_holds_at_its_peak(name: str, optimizer: str) -> None:
    model, source = MODELS[name]
    how: dict[str, Any] = {"momentum": {"name": "sgd", "momentum": 0.9}}.get(optimizer, {"name": optimizer})
    work = Train(model, optimizer=ClientOptimizer(**how))
    start, batch = model.init(0), first(source)

    def peak_of_steps() -> int:
        gc.collect()
        gc.disable()
        tracker = MemTracker()
        with tracker:
            job = Job(work="t", shared=Shared.of_flat(start), version=0, clients=(0,), seed=0)
            state = work.init(job, (0,), None)
            for _ in range(3):
                state = work.step(state, batch)
        gc.enable()
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])

    # Now and then the tracker counts a storage twice, when it meets it under another object; it never counts less.
    peak = min(peak_of_steps() for _ in range(10))
    told = need(model, batch, optimizer=optimizer)  # type: ignore[arg-type]
    assert told.parameters == nbytes(start)
    assert peak <= told.total <= peak * 1.35


def test_more_rows_need_more_activations_and_nothing_else() -> None:
    model = ImageMLP(64, hidden=(32,), classes=10)
    few, many = (need(model, first(pixels(rows=rows))) for rows in (16, 64))
    assert many.activations == pytest.approx(4 * few.activations, abs=16)  # a scalar does not grow
    assert (many.parameters, many.moments) == (few.parameters, few.moments)


def test_each_client_gets_the_largest_that_fits() -> None:
    batch = first(pixels())
    members = family((8, 256, 32, 128), lambda w: ImageMLP(64, hidden=(w, w), classes=10), batch)
    assert [m.config for m in members] == [8, 32, 128, 256]
    for at, member in enumerate(members):
        assert largest_fitting(member.need.total, members).config == member.config
        after = members[at + 1].need.total if at + 1 < len(members) else 2 * member.need.total
        assert largest_fitting(after - 1, members).config == member.config
    with pytest.raises(LichenError, match="train no model of the family"):
        largest_fitting(members[0].need.total - 1, members)
    with pytest.raises(LichenError, match="train no model"):
        largest_fitting(1 << 40, ())


def test_the_optimizer_decides_what_fits() -> None:
    batch = first(pixels())

    def made(optimizer: Any) -> int:
        members = family((16, 64, 256), lambda w: ImageMLP(64, hidden=(w, w), classes=10), batch, optimizer=optimizer)
        return largest_fitting(2_000_000, members).config

    assert made("sgd") == 256
    assert made("adamw") == 64


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(LichenError, match="unknown optimizer"):
        need(MODELS["mlp"][0], first(pixels()), optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="lacks 'input_ids_CBT'"):
        need(MODELS["text-cnn"][0], first(pixels()))
