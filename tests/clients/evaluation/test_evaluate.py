"""Evaluation, personal best and the report's scalars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.evaluation.metrics import accuracy, macro_f1, perplexity
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.fold import serve
from lichen.core.store import ClientStore
from support.toy_cohorts import Bigram, Softmax, fold, job, rows


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_metrics_equal_sklearn(pairs: Any) -> None:
    true, taken = zip(*pairs, strict=True)
    confusion = torch.from_numpy(confusion_matrix(true, taken, labels=range(5)))
    assert accuracy(confusion) == pytest.approx(accuracy_score(true, taken))
    assert macro_f1(confusion) == pytest.approx(f1_score(true, taken, average="macro", zero_division=0))


def test_metrics_without_rows_are_nan_and_overflow_is_infinite() -> None:
    assert math.isnan(accuracy(torch.zeros(2, 2)))
    assert math.isnan(macro_f1(torch.zeros(2, 2)))
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity(1e9, 1) == math.inf


def test_classifier_counts_each_client_and_ignores_padding_rows() -> None:
    model = Softmax()
    shared = model.init(3)
    batches = [rows(t, range(3), active=[True, t == 0, True]) for t in range(2)]
    batches[0]["labels_CB"][0, 1] = -100
    batches[1]["index_CB"][2, 3] = -1
    message, own = fold(Evaluate(model), job(shared, range(3), version=7), batches)
    assert own is None
    assert message.tensors == {}
    assert message.version_C.tolist() == [7, 7, 7]
    assert message.weight_C.tolist() == [7, 4, 7]
    for c in range(3):
        loss, true, taken = 0.0, [], []
        for batch in batches:
            for b in range(4):
                label = int(batch["labels_CB"][c, b])
                if label < 0 or batch["index_CB"][c, b] < 0 or not batch["active_C"][c]:
                    continue
                logits = shared["weight"] @ batch["x_CBF"][c, b].double() + shared["bias"]
                loss -= float(logits.log_softmax(0)[label])
                true.append(label)
                taken.append(int(logits.argmax()))
        assert float(message.metrics["loss_sum"][c]) == pytest.approx(loss, rel=1e-5)
        expected = confusion_matrix(true, taken, labels=range(3))
        assert np.array_equal(message.metrics["confusion"][c].numpy(), expected)


def test_language_model_perplexity() -> None:
    model = Bigram()
    ids = torch.tensor([[[1, 2, 3, 4]]])
    batch = {"active_C": torch.tensor([True]), "input_ids_CBT": ids, "labels_CBT": ids}
    message, _ = fold(Evaluate(model), job(model.init(0), [0]), [batch, batch])
    assert set(message.metrics) == {"loss_sum", "count"}
    value = perplexity(float(message.metrics["loss_sum"]), float(message.metrics["count"]))
    assert value == pytest.approx(5.0, rel=1e-6)


def test_personal_uses_own_and_best_where_asked() -> None:
    model = Softmax()
    shared = model.init(0)
    other = {f"params/{n}": x * 2 for n, x in trees.broadcast(shared, 2).items()}
    best = {f"best/{n}": x * 3 for n, x in trees.broadcast(shared, 2).items()}
    batch = rows(0, range(2))

    def loss(own: Any, factor: float = 1.0, **how: Any) -> Any:
        scaled = {n: x * factor for n, x in shared.items()}
        return fold(Evaluate(model, **how), job(scaled, range(2)), [batch], own)[0].metrics["loss_sum"].tolist()

    own = {**other, **best}
    assert loss(own) == loss(None)
    assert loss(own, personal=True) == loss(None, factor=2.0)
    assert loss(own, personal=True, use_best=True) == loss(None, factor=3.0)
    assert loss(other, personal=True, use_best=True) == loss(None, factor=2.0)
    assert loss(None, personal=True) == loss(None)


class Rows:
    """Some batches: the same for ever, or others for every seed of a job."""

    def __init__(self, first: Any, count: int, *, stride: int = 0) -> None:
        self.first, self.count, self.stride = first, count, stride

    def shape(self, client: int) -> Any:
        return ()

    def batches(self, clients: int, seed: int) -> Any:
        for t in range(self.count):
            yield rows(self.first + self.stride * seed + t, clients)


def test_everybody_keeps_their_own_best_round_through_the_store(tmp_path: Path) -> None:
    model = Softmax()
    shared = model.init(0)
    client_tasks = {
        "train": ClientTask(
            work=Train(model, optimizer=ClientOptimizer("adamw", lr=0.15), personal=True), source=Rows(0, 1, stride=1)
        ),
        "keep": ClientTask(work=KeepBest(model), source=Rows(0, 3)),
        "judge": ClientTask(work=Evaluate(model, personal=True, use_best=True), source=Rows(0, 3)),
    }

    def run(store: Any, *, repeat: Any) -> Any:
        values, version = [], 0
        for _ in range(5):
            for work in ("train", "keep"):
                for _ in range(repeat):
                    message = next(
                        serve(job(shared, range(8), work=work, version=version, seed=version), client_tasks, store)
                    )
                version += 1
            values.append(message.metrics["loss_sum"] / message.metrics["count"])
        judged = next(serve(job(shared, range(8), work="judge", version=version), client_tasks, store))
        return torch.stack(values), judged.metrics["loss_sum"] / judged.metrics["count"], store.load(range(8), version)

    values, judged, own = run(ClientStore(tmp_path / "a"), repeat=1)
    assert torch.equal(judged, values.min(0).values)
    assert torch.equal(own["best_value"], judged)
    assert own["best_version"].tolist() == [2 * int(i) + 1 for i in values.argmin(0)]
    assert len(set(own["best_version"].tolist())) > 1
    again = run(ClientStore(tmp_path / "b"), repeat=2)[2]
    assert trees.digest(again) == trees.digest(own)


def test_keep_best_on_its_own_output_changes_nothing_and_no_rows_keeps_the_newest() -> None:
    model = Softmax()
    shared = model.init(0)
    own = {f"params/{n}": x for n, x in trees.broadcast(shared, 2).items()}
    batch = rows(0, range(2), active=[True, False])
    first, own = fold(KeepBest(model), job(shared, range(2)), [batch], own)
    again, own_again = fold(KeepBest(model), job(shared, range(2)), [batch], own)
    assert trees.digest(own) == trees.digest(own_again)
    assert first.metrics["improved"].tolist() == [1, 1]
    assert again.metrics["improved"].tolist() == [0, 1]
    worse = {**own, "params/weight": own["params/weight"] * -50}
    _, kept = fold(KeepBest(model), job(shared, range(2), version=9), [batch], worse)
    assert torch.equal(kept["best/weight"][0], own["best/weight"][0])
    assert torch.equal(kept["best/weight"][1], worse["params/weight"][1])
    assert kept["best_version"].tolist() == [0, 9]
