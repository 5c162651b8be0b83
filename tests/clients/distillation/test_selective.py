"""Selective transfer: counts by hand, what it takes and leaves, and that nothing of it leaves the client.

Legend: C clients, B rows, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lichen.clients.distillation.selective import Selective, agreement_with_teacher, predicted_labels, trusted
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.errors import LichenError
from lichen.core.message import Job, concatenate_messages, pack_message
from lichen.core.tree import stack
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, MixedSource, TrainSource
from lichen.models.students.students import ImageMLP

CLASSES, FEATURES = 3, 4
MODEL = ImageMLP(FEATURES, hidden=(), classes=CLASSES)
TRAIN = Train(MODEL, optimizer=ClientOptimizer("sgd", lr=0.5))


def _rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The class of a row is the largest of its first three features."""
    x = np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)
    return x, x[:, :CLASSES].argmax(1).astype(np.int64)


def _world(clients: int, said_of_class: dict[int, int]) -> tuple[MixedSource, EvalSource, Tensor, dict[str, Tensor]]:
    """A teacher that calls class k ``said_of_class[k]``; judged rows of client c answer from 20 c on."""
    private = [_rows(c, 4) for c in range(clients)]
    judged = [_rows(100 + c, 20) for c in range(clients)]
    called = np.vectorize(lambda k: said_of_class.get(int(k), int(k)))
    said = torch.from_numpy(np.concatenate([called(y) for _, y in judged]))
    x, y = _rows(999, 60)
    answers = {"answers.prob": torch.ones(60, 1), "answers.index": torch.from_numpy(called(y))[:, None]}
    local = TrainSource(tuple(ArrayShard(a, labels=b) for a, b in private), batch_size=4, steps=6)
    public = ArrayShard(x, labels=np.full(60, -100, np.int64), answer=np.arange(60))
    shards = tuple(ArrayShard(a, labels=b, answer=np.arange(20 * c, 20 * c + 20)) for c, (a, b) in enumerate(judged))
    return MixedSource(local, public=public, public_rows=16), EvalSource(shards, batch_size=8), said, answers


def _run(work: Any, shared: dict[str, Tensor], clients: list[int], source: Any, own: Any = None) -> Any:
    job = Job(work="train", shared=Shared.of_flat(shared), version=0, clients=tuple(clients), seed=5)
    state = work.init(job, clients, own)
    for batch in source.batches(clients, job.seed):
        state = work.step(state, batch)
    return (*work.final(state), state)


@given(seed=st.integers(0, 500))
def test_counts_equal_a_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "active_C": torch.tensor([True, False, True]),
        "x_CBF": torch.randn(3, 7, FEATURES, generator=generator),
        "labels_CB": torch.randint(-1, CLASSES, (3, 7), generator=generator),
        "answer_CB": torch.randint(-1, 10, (3, 7), generator=generator),
    }
    batch["labels_CB"][batch["labels_CB"] < 0] = -100
    said = torch.randint(-1, CLASSES, (10,), generator=generator)
    params_C = stack([MODEL.init(c) for c in range(3)])
    counts = agreement_with_teacher(MODEL, params_C, {}, said, batch)
    own = MODEL.logits(params_C, {}, batch).argmax(-1)
    known = (batch["labels_CB"] >= 0) & (batch["answer_CB"] >= 0)
    for c in range(3):
        for k in range(CLASSES):
            rows = [b for b in range(7) if c != 1 and bool(known[c, b]) and said[batch["answer_CB"][c, b]] == k]
            assert counts["rows"][c, k] == len(rows)
            assert counts["teacher"][c, k] == sum(int(batch["labels_CB"][c, b]) == k for b in rows)
            assert counts["own"][c, k] == sum(int(batch["labels_CB"][c, b]) == int(own[c, b]) for b in rows)


def test_few_rows_lean_on_the_mean_and_none_at_all_trusts() -> None:
    counts = {
        "rows": torch.tensor([[10.0, 1.0, 0.0], [0.0, 0.0, 0.0], [5.0, 5.0, 0.0]]),
        "teacher": torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]),
        "own": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [4.0, 2.0, 0.0]]),
    }
    # d̄ = 7/11 for the first client: with m = 2 one lost row weighs less than the rest, with m = 1 more.
    assert trusted(counts, prior=2.0).tolist() == [[True, True, True], [True] * 3, [False, False, False]]
    assert trusted(counts, prior=1.0)[0].tolist() == [True, False, True]


def test_answers_of_a_broken_class_are_left_out_and_the_rest_is_bit_equal() -> None:
    source, judge, said, answers = _world(4, {2: 0})  # says 0 for class 2, and never 2
    shared = {**MODEL.init(0), **answers}
    work = Selective(TRAIN, judge=judge, teacher_label_M=said)
    message, own, state = _run(work, shared, [0, 1, 2, 3], source)
    assert own["trust/taken"].shape == (4, CLASSES)
    assert bool(state.trust_CK[:, 1].all())  # right about what it calls 1
    assert own["trust/rows"].sum(1).tolist() == [20.0] * 4
    plain, _, _ = _run(TRAIN, shared, [0, 1, 2, 3], source)
    assert message.metrics["count"].tolist() < plain.metrics["count"].tolist() or bool(state.trust_CK.all())
    believing = {**answers, "answers.index": torch.full_like(answers["answers.index"], 1)}
    same = [_run(w, {**MODEL.init(0), **believing}, [0, 1, 2, 3], source)[0] for w in (work, TRAIN)]
    assert pack_message(same[0]) == pack_message(same[1])


def test_a_good_own_model_takes_no_word_of_a_broken_teacher() -> None:
    source, judge, said, answers = _world(3, {0: 1, 1: 2, 2: 0})  # wrong about everything
    perfect = {"layer0.weight": 10 * torch.eye(CLASSES, FEATURES), "layer0.bias": torch.zeros(CLASSES)}
    work = Selective(TRAIN, judge=judge, teacher_label_M=said)
    message, own, _ = _run(work, {**perfect, **answers}, [0, 1, 2], source)
    assert not bool(own["trust/taken"].any())
    # Bit for bit what the labels alone teach.
    unanswered = [{**b, "answer_CB": torch.full_like(b["answer_CB"], -1)} for b in source.batches([0, 1, 2], 5)]
    job = Job(work="train", shared=Shared.of_flat(perfect), version=0, clients=(0, 1, 2), seed=5)
    state = TRAIN.init(job, [0, 1, 2], None)
    for batch in unanswered:
        state = TRAIN.step(state, batch)
    assert pack_message(TRAIN.final(state)[0]) == pack_message(message)


def test_company_changes_no_byte_and_only_the_training_leaves() -> None:
    source, judge, said, answers = _world(5, {2: 0})
    shared = {**MODEL.init(0), **answers}
    work = Selective(TRAIN, judge=judge, teacher_label_M=said)
    together, own, _ = _run(work, shared, list(range(5)), source)
    alone = [_run(work, shared, [c], source) for c in range(5)]
    assert pack_message(together) == pack_message(concatenate_messages([message for message, _, _ in alone]))
    for c, (_, mine, _) in enumerate(alone):
        assert all(torch.equal(own[name][c], mine[name][0]) for name in own)
    plain, _, _ = _run(TRAIN, shared, [0], source)
    assert together.metrics.keys() == plain.metrics.keys()
    assert together.tensors.keys() == plain.tensors.keys()


def test_personal_training_keeps_its_state_beside_the_judgement() -> None:
    source, judge, said, answers = _world(2, {})
    work = Selective(Train(MODEL, personal=True), judge=judge, teacher_label_M=said)
    _, own, first = _run(work, {**MODEL.init(0), **answers}, [0, 1], source)
    assert {"params/layer0.weight", "opt/step", "trust/taken"} <= own.keys()
    other = {**own, "best/layer0.weight": own["params/layer0.weight"]}
    _, later, second = _run(work, {**MODEL.init(0), **answers}, [0, 1], source, other)
    assert "best/layer0.weight" in later
    # The second time it is the client's own model that is judged, and that has learned.
    assert float(second.counts["own"].sum()) > float(first.counts["own"].sum())


def test_no_rows_to_judge_by_and_no_answers_change_nothing() -> None:
    source, _, said, answers = _world(2, {2: 0})
    none = np.zeros(0, np.int64)
    nobody = ArrayShard(np.zeros((0, FEATURES), np.float32), labels=none, answer=none)
    empty = EvalSource((nobody, nobody), batch_size=4)
    work = Selective(TRAIN, judge=empty, teacher_label_M=said)
    shared = {**MODEL.init(0), **answers}
    assert pack_message(_run(work, shared, [0, 1], source)[0]) == pack_message(_run(TRAIN, shared, [0, 1], source)[0])
    local = [_run(w, MODEL.init(0), [0, 1], source.local)[0] for w in (work, TRAIN)]
    assert pack_message(local[0]) == pack_message(local[1])


def test_nonsense_is_refused() -> None:
    _, judge, said, _ = _world(2, {})
    with pytest.raises(LichenError, match=r"selective\.prior"):
        Selective(TRAIN, judge=judge, teacher_label_M=said, prior=0.0)
    bare = EvalSource((ArrayShard(*_rows(0, 3)[:1], labels=_rows(0, 3)[1]),), batch_size=2)
    job = Job(work="train", shared=Shared(MODEL.init(0)), version=0, clients=(0,), seed=0)
    with pytest.raises(LichenError, match="name no answers"):
        Selective(TRAIN, judge=bare, teacher_label_M=said).init(job, (0,), None)
    unknown = {
        "answers.prob": torch.tensor([[0.9, 0.1], [0.0, 0.0]]),
        "answers.index": torch.tensor([[-1, 2], [-1, -1]]),
    }
    assert predicted_labels(unknown).tolist() == [2, -1]
