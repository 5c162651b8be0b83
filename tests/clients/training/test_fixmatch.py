"""FixMatch and FlexMatch around training: the loss they say, thresholds, teachers, and bits that no company changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lichen.clients.training.fixmatch import FixMatch, thresholds_CK
from lichen.clients.training.gradient_steps import Proximal
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.store import ClientStore
from lichen.data.batches.augment import TextViews, Words
from lichen.data.batches.augment_images import ImageViews, Pixels
from lichen.data.batches.scarce_labels import ScarceLabels, hide
from lichen.data.batches.shards import ArrayShard, TextShard, TrainSource
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.models.adapters.lora import Lora
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.loading.classifier import load_classifier
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN
from support.tiny_llama import save_model
from support.toy_cohorts import Bigram, fold, job

SGD = ClientOptimizer("sgd", lr=0.5)
MLP = ImageMLP(64, hidden=(16,), classes=10)
VIEWS = ImageViews(side=8)


@pytest.fixture(scope="module")
def written() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 64) and labels (N,) of handwritten digits, in some order."""
    records = load_records("digits")
    order = np.random.default_rng(0).permutation(len(records))
    x = np.stack([np.asarray(records[i].features).reshape(64) for i in order])
    return x, np.array([int(records[i].label) for i in order])


def shards(written: tuple[np.ndarray, np.ndarray], clients: int, keep: int, *, each: int = 105) -> list[Any]:
    x, y = written
    parts = [slice(c * each, (c + 1) * each) for c in range(clients)]
    return [hide(ArrayShard(x=x[p], labels=y[p]), keep, seed=0, client=c) for c, p in enumerate(parts)]


def train(model: Any, **more: Any) -> Train:
    return Train(model, optimizer=SGD, **more)


def step_of(sources: Any, clients: Any, seed: int = 1) -> Any:
    return list(sources.batches(clients, seed))


def test_one_step_is_the_gradient_of_the_loss_it_says(written: Any) -> None:
    local = shards(written, 1, 20)
    (batch,) = step_of(ScarceLabels(TrainSource(local, batch_size=8, steps=1), unlabelled_rows=24), (0,))
    start, work = MLP.init(3), FixMatch(train(MLP), VIEWS, threshold=0.12, weight=2.0)
    message, _ = fold(work, job(start, (0,)), [batch])

    views = [VIEWS.view(batch, k, seed=1, clients=(0,), step=0)["x_CBF"][0] for k in ("weak", "strong")]
    leaves = {name: x.clone().requires_grad_() for name, x in start.items()}
    labels, free = batch["labels_CB"][0], batch["labels_CB"][0] < 0
    weak, strong = (MLP.apply(leaves, x) for x in views)
    sure, found = weak.detach().softmax(-1).max(-1)
    chosen = free & (sure >= 0.12)
    assert 0 < int(chosen.sum()) < 24
    supervised = cross_entropy(weak[~free], labels[~free])
    loss = supervised + 2 * cross_entropy(strong[chosen], found[chosen], reduction="sum") / 24
    grads = torch.autograd.grad(loss, list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(message.tensors[name][0], -0.5 * grad, rtol=1e-4, atol=1e-6)
    assert message.metrics["unlabelled"].tolist() == [24]
    assert message.metrics["pseudo"].tolist() == [int(chosen.sum())]
    assert message.weight_C.tolist() == [8 + int(chosen.sum())]
    mean = message.metrics["loss_sum"] / message.metrics["count"]
    torch.testing.assert_close(mean, loss.detach().double()[None], rtol=1e-5, atol=1e-6)


def bert_like(folder: Path) -> Any:
    model, tokenizer = load_classifier(save_model(folder), classes=3, seed=0)
    adapter = Lora(targets=("q_proj", "v_proj"), rank=2, heads=("score",))
    return ClassifierCohort(model, adapter=adapter, name="tiny"), TextViews.of(tokenizer, weak=Words(drop=0.1))


def text_shards(clients: int, keep: int) -> list[Any]:
    rng = np.random.default_rng(0)
    out = []
    for c in range(clients):
        ids = [rng.integers(7, 40, n).astype(np.int32) for n in rng.integers(4, 12, 20)]
        out.append(hide(TextShard(ids, labels=rng.integers(0, 3, 20), kind="classify"), keep, seed=0, client=c))
    return out


@pytest.mark.parametrize("kind", ["mlp", "cnn", "words", "lora"])
def test_bits_do_not_depend_on_company(kind: str, written: Any, tmp_path: Path) -> None:
    """Client 1 has no unlabelled row: beside the others it must do exactly what plain training does alone."""
    views: Any = VIEWS
    if kind in ("mlp", "cnn"):
        model: Any = MLP if kind == "mlp" else ImageCNN(8, width=4, classes=10)
        local, pad = shards(written, 3, 10, each=40), 0
        local[1] = ArrayShard(x=local[1].x[:12], labels=np.arange(12) % 10)
    else:
        model, views = (TextCNN(48, width=8, classes=3), None) if kind == "words" else bert_like(tmp_path)
        views = views or TextViews(3, strong=Words(drop=0.3, swap=0.2))
        local, pad = text_shards(3, 6), 3
        local[1] = replace(local[1], labels=np.arange(20) % 3)
    inner = TrainSource(local, batch_size=4, steps={0: 3, 1: 2, 2: 3}, pad=pad, fixed_width=None if pad == 0 else 16)
    source, start = ScarceLabels(inner, unlabelled_rows=6), model.init(1)
    unlabelled = [int((shard.labels < 0).sum()) for shard in local]
    work = FixMatch(train(model), views, threshold=0.11 if kind != "lora" else 0.3, rows=40, unlabelled=unlabelled)
    together, own = fold(work, job(start, (0, 1, 2)), step_of(source, (0, 1, 2)))
    for c in range(3):
        alone, mine = fold(work, job(start, (c,)), step_of(source, (c,)))
        for name, x in alone.tensors.items():
            assert torch.equal(x[0], together.tensors[name][c]), name
        assert all(torch.equal(x[0], own[name][c]) for name, x in mine.items())
        assert all(torch.equal(x[0], together.metrics[name][c]) for name, x in alone.metrics.items())
    plain, _ = fold(train(model), job(start, (1,)), step_of(source, (1,)))
    assert all(torch.equal(x[0], together.tensors[name][1]) for name, x in plain.tensors.items())
    assert torch.equal(plain.metrics["loss_sum"][0], together.metrics["loss_sum"][1])
    assert together.metrics["unlabelled"].tolist() == [18, 0, 18]
    assert float(together.metrics["pseudo"].sum()) > 0


def test_without_unlabelled_rows_it_is_training_bit_for_bit(written: Any) -> None:
    local = shards(written, 2, 105)
    source = TrainSource(local, batch_size=8, steps=4)
    asked, batches = job(MLP.init(0), (0, 1)), step_of(source, (0, 1))
    for more in ({}, {"gradient_steps": (Proximal(0.1),)}, {"personal": True}, {"local_params": ("layer1.bias",)}):
        plain, own = fold(train(MLP, **more), asked, batches)
        wrapped, mine = fold(FixMatch(train(MLP, **more), VIEWS), asked, batches)
        assert all(torch.equal(x, wrapped.tensors[name]) for name, x in plain.tensors.items())
        assert all(torch.equal(x, wrapped.metrics[name]) for name, x in plain.metrics.items())
        assert (own is None) == (mine is None)
        assert all(torch.equal(x, mine[name]) for name, x in (own or {}).items())


def test_who_is_sure_of_nothing_and_has_no_label_does_not_step(written: Any) -> None:
    local = [replace(shard, labels=np.full(105, -100)) for shard in shards(written, 1, 0)]
    source = ScarceLabels(TrainSource(local, batch_size=4, steps=3), unlabelled_rows=8)
    decay = Train(MLP, optimizer=ClientOptimizer("adamw", lr=0.1, weight_decay=0.5))
    message, _ = fold(FixMatch(decay, VIEWS, threshold=1.0), job(MLP.init(0), (0,)), step_of(source, (0,)))
    assert all(float(x.abs().max()) == 0 for x in message.tensors.values())
    assert message.weight_C.tolist() == message.metrics["steps"].tolist() == [0]
    moved, _ = fold(FixMatch(decay, VIEWS, threshold=0.0), job(MLP.init(0), (0,)), step_of(source, (0,)))
    assert moved.weight_C.tolist() == [24]


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=30), st.sampled_from([0.5, 0.95]), st.integers(0, 5))
def test_thresholds_rise_with_what_is_learned(found: list[int], threshold: float, labelled: int) -> None:
    """The rows of a table that have a label are no unused ones."""
    table = torch.tensor([[-1] * labelled + found])
    (limit_K,) = thresholds_CK(table, torch.tensor([len(found)]), 4, threshold).tolist()
    counts = [found.count(k) for k in range(4)]
    best = max(*counts, found.count(-1), 1)
    for k, limit in enumerate(limit_K):
        assert 0 <= limit <= threshold
        share = counts[k] / best
        assert limit == pytest.approx(threshold * share / (2 - share))
    assert [k for _, k in sorted(zip(limit_K, range(4), strict=True))] == sorted(range(4), key=counts.__getitem__)


def test_rows_that_no_step_has_seen_hold_thresholds_down() -> None:
    """Of 58 rows a first step saw five, all surely of one class: the other 53 are unused, and count."""
    table = torch.tensor([[0] * 5 + [-1] * 53])
    (limit_K,) = thresholds_CK(table, torch.tensor([58]), 2, 0.95).tolist()
    assert limit_K == pytest.approx([0.95 * (5 / 53) / (2 - 5 / 53), 0])
    assert round(limit_K[0], 3) == 0.047


def test_the_table_lasts_from_round_to_round_and_hard_classes_get_in(written: Any, tmp_path: Path) -> None:
    local = shards(written, 2, 20)
    begin, _ = fold(train(MLP), job(MLP.init(0), (0,)), step_of(TrainSource(local[:1], batch_size=105, steps=60), (0,)))
    start = {name: x + begin.tensors[name][0] for name, x in MLP.init(0).items()}
    source = ScarceLabels(TrainSource(local, batch_size=20, steps=5), unlabelled_rows=40)
    asked = job(start, (0, 1), work="train")
    chosen, still = {}, replace(VIEWS, weak=Pixels())
    for rows_kept in (None, 105):
        work = FixMatch(train(MLP), still, threshold=0.7, rows=rows_kept, unlabelled=(85, 85))
        store = ClientStore(tmp_path / str(rows_kept))
        engine = LocalEngine({"train": ClientTask(work=work, source=source)}, store)
        messages = [next(drain(engine, replace(asked, version=v, seed=v))) for v in range(3)]
        chosen[rows_kept] = sum(float(m.metrics["pseudo"].sum()) for m in messages)
    table = store.load((0, 1), 3)["semi/table"]  # type: ignore[index]
    assert table.shape == (2, 105)
    for c in range(2):
        labelled = torch.from_numpy(local[c].labels >= 0)
        assert bool((table[c][labelled] == -1).all())
        assert bool((table[c][~labelled] >= -1).all())
    assert len(set(table[table >= 0].tolist())) > 3
    assert chosen[105] > chosen[None] > 0
    with pytest.raises(LichenError, match="private state"):
        fold(FixMatch(train(MLP), VIEWS, rows=7), asked, [], {"semi/table": table})
    with pytest.raises(LichenError, match=r"FixMatch\.rows"):
        fold(FixMatch(train(MLP), VIEWS, rows=50, unlabelled=(85, 85)), asked, step_of(source, (0, 1)))
    with pytest.raises(LichenError, match=r"FixMatch\.unlabelled"):
        fold(FixMatch(train(MLP), VIEWS, rows=105, unlabelled=(85,)), asked, step_of(source, (0, 1)))


def test_a_failed_client_keeps_the_table_it_came_with(written: Any) -> None:
    local = shards(written, 1, 20)
    local = [ArrayShard(x=np.where(local[0].labels[:, None] >= 0, np.inf, local[0].x), labels=local[0].labels)]
    source = ScarceLabels(TrainSource(local, batch_size=4, steps=2), unlabelled_rows=8)
    before = torch.full((1, 105), 4, dtype=torch.int32)
    work = FixMatch(train(MLP), VIEWS, rows=105, unlabelled=(85,))
    message, own = fold(work, job(MLP.init(0), (0,)), step_of(source, (0,)), {"semi/table": before})
    assert message.metrics["failed"].tolist() == [1]
    assert torch.equal(own["semi/table"], before)


def test_a_teacher_labels_own_rows_in_the_first_rounds(written: Any) -> None:
    x, y = written
    bare = ArrayShard(x=x[:60], labels=np.full(60, -100), answer=np.arange(60))
    source = ScarceLabels(TrainSource([bare], batch_size=1, steps=1), unlabelled_rows=60)
    sure = torch.linspace(0.5, 1, 60)
    prob = torch.stack([1 - sure, sure], 1)
    index = torch.stack([torch.from_numpy((y[:60] + 1) % 10), torch.from_numpy(y[:60])], 1).to(torch.uint8)
    shared = {**MLP.init(0), "answers.prob": prob, "answers.index": index}
    work = FixMatch(train(MLP), VIEWS, threshold=0.8, teacher_rounds=2)
    (batch,) = step_of(source, (0,))
    told, _ = fold(work, job(shared, (0,), version=1), [batch])
    assert told.metrics["pseudo"].tolist() == [int((sure >= 0.8).sum())]
    truth = torch.where(sure >= 0.8, torch.from_numpy(y[:60]), -100)[batch["index_CB"]]
    truth = truth.masked_fill(batch["index_CB"] < 0, -100)
    strong = VIEWS.view(batch, "strong", seed=1, clients=(0,), step=0)
    leaves = {name: p.clone().requires_grad_() for name, p in MLP.init(0).items()}
    loss = cross_entropy(MLP.apply(leaves, strong["x_CBF"][0]), truth[0], reduction="sum") / 60
    for (name, _), grad in zip(leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True):
        torch.testing.assert_close(told.tensors[name][0], -0.5 * grad, rtol=1e-4, atol=1e-6)
    later, _ = fold(work, job(shared, (0,), version=2), [batch])
    assert later.metrics["pseudo"].tolist() == [0]
    assert later.metrics["count"].tolist() == [0]  # the answers are not learned behind its back either
    with pytest.raises(LichenError, match="none came down"):
        fold(work, job(MLP.init(0), (0,), version=1), [batch])


def test_settings_out_of_range_are_refused() -> None:
    for bad in ({"threshold": 1.5}, {"weight": -1.0}, {"rows": 0}, {"weight": float("nan")}):
        with pytest.raises(LichenError, match=r"semi\.|FixMatch\."):
            FixMatch(train(MLP), VIEWS, **bad)
    with pytest.raises(LichenError, match="language model"):
        FixMatch(train(Bigram()), VIEWS)
