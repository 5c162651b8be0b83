"""What teaching does on real reviews: a frozen MiniLM with a head teaches small students with ten labels each.

Legend: N rows or clients, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lichen.algorithms.agnostic import AFL
from lichen.algorithms.average import Average
from lichen.clients.distillation.distill import pre_distil
from lichen.clients.distillation.selective import Selective, predicted_labels
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.collect import drain
from lichen.core.contracts.client import ClientTask, ClientWork
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource, MixedSource, TextShard, TrainSource
from lichen.data.batches.text import encode_classify, pad_id
from lichen.data.sources.catalog import fetch_entry
from lichen.data.sources.records import Record
from lichen.engines.local import LocalEngine
from lichen.models.features import EncoderFeatures
from lichen.models.layerwise_distillation import EncoderStates, Layers, renumbering
from lichen.models.loading.load import load_encoder
from lichen.models.students.students import ImageMLP, TextCNN, TwoLayerTransformer
from lichen.recipes.rows.prepare import gather
from lichen.recipes.schema.read import read_recipe
from lichen.server.fairness.gain import per_client_gain
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Uniform

CLASSES = ("bad", "mixed", "good")
CLIENTS, FEW, JUDGED, TEST, PUBLIC = 6, 10, 12, 150, 300
LENGTH = 32


@dataclass(frozen=True)
class School:
    """Rows in the encoder's tokens, in the students' words, and the encoder."""

    encoder: Any
    tokenizer: Any
    parts: dict[str, tuple[TextShard, ...]]
    words_V: Tensor
    vocabulary: int

    def features(self, shard: TextShard) -> ArrayShard:
        out = torch.zeros(shard.size, 384)
        order = np.argsort(shard.length_N, kind="stable")
        features = EncoderFeatures(self.encoder, normalize=True, reference=False)
        for at in range(0, shard.size, 32):
            rows = order[at : at + 32]
            width = int(shard.length_N[rows].max())
            ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
            for r, i in enumerate(rows):
                tokens = torch.from_numpy(shard.input_ids[int(i)])
                ids[r, : len(tokens)], mask[r, : len(tokens)] = tokens, 1
            out[rows] = features.rows(ids, mask)
        return ArrayShard(out.numpy(), labels=np.asarray(shard.labels))

    def own_words(self, shard: TextShard) -> TextShard:
        ids = [self.words_V[torch.from_numpy(row).long()].numpy().astype(np.int32) for row in shard.input_ids]
        return replace(shard, input_ids=ids)


class Lesson:
    """The teacher's head and answers, made when first needed."""

    def __init__(self, school: School) -> None:
        self.school = school

    @cached_property
    def known(self) -> ArrayShard:
        return self.school.features(self.school.parts["labelled"][0])

    @cached_property
    def head(self) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(max_iter=500, C=10.0).fit(self.known.x, self.known.labels)

    def answers(self, shard: TextShard) -> Tree:
        chance_NK = torch.from_numpy(self.head.predict_proba(self.school.features(shard).x)).float()
        prob, index = chance_NK.sort(dim=1, descending=True)
        return {"answers.prob": prob, "answers.index": index}

    @cached_property
    def public(self) -> Tree:
        return self.answers(self.school.parts["public"][0])

    @cached_property
    def judged(self) -> Tree:
        every = self.school.parts["judged"]
        whole = TextShard(
            [row for s in every for row in s.input_ids],
            labels=np.concatenate([np.asarray(s.labels) for s in every]),
            kind="classify",
        )
        return self.answers(whole)


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    try:
        folder = fetch_entry("minilm-l6")
        fetch_entry("clothing-reviews")
    except LichenError as error:
        pytest.skip(f"cannot be fetched here: {error}")
    of = {1: "bad", 2: "bad", 3: "mixed", 5: "good"}
    rows: dict[str, list[Record]] = {c: [] for c in CLASSES}
    for record in gather(read_recipe("reviews-teacher")):
        label = of.get(int(str(record.label)))
        if label and record.text:
            rows[label].append(replace(record, label=label))
    mixed: list[Record] = []
    drawn = [[rows[c][i] for i in numpy_generator(0, c).permutation(len(rows[c]))[:520]] for c in CLASSES]
    for three in zip(*drawn, strict=True):  # every part holds the classes in equal numbers
        mixed.extend(three)
    model, tokenizer = load_encoder(folder)
    at = 0

    def take(count: int) -> TextShard:
        nonlocal at
        some, at = mixed[at : at + count], at + count
        return TextShard.of(encode_classify(some, tokenizer, max_length=LENGTH, classes=CLASSES), kind="classify")

    parts = {"labelled": (take(240),), "public": (take(PUBLIC),)}
    for name, count in (("few", FEW), ("judged", JUDGED), ("test", TEST)):
        parts[name] = tuple(take(count) for _ in range(CLIENTS))
    counts: dict[int, int] = {}
    for row in (*parts["public"][0].input_ids, *parts["labelled"][0].input_ids):
        for token in row.tolist():
            counts[token] = counts.get(token, 0) + 1
    keep = [pad_id(tokenizer), int(tokenizer.unk_token_id)]
    ranked = sorted(counts.keys() - set(keep), key=lambda t: (-counts[t], t))[:1000]
    words = {token: i for i, token in enumerate([*keep, *ranked])}
    table = renumbering(words, unknown=1, vocabulary=model.config.vocab_size)
    return Lesson(School(model, tokenizer, parts, table, len(words)))


def _students(school: School) -> TextCNN:
    return TextCNN(school.vocabulary, width=24, classes=3, kernels=(1, 2))


def _federate(
    lesson: Lesson, folder: Path, work: ClientWork, start: Tree, public: ArrayShard | TextShard | None, rounds: int = 8
) -> Tensor:
    """Accuracy on every client's test rows after some rounds."""
    school = lesson.school
    few = tuple(school.own_words(s) for s in school.parts["few"])
    test = tuple(school.own_words(s) for s in school.parts["test"])
    local = TrainSource(few, batch_size=FEW, steps=6, fixed_width=LENGTH)
    source = local if public is None else MixedSource(local, public=public, public_rows=24)
    client_tasks = {
        "train": ClientTask(work=work, source=source),
        "test": ClientTask(
            work=Evaluate(_students(school)), source=EvalSource(test, batch_size=TEST, fixed_width=LENGTH)
        ),
    }
    engine = LocalEngine(client_tasks, ClientStore(folder))
    average = Average(
        aggregator=Mean("uniform"),
        optimizer=ServerSGD(),
        sampler=Uniform(CLIENTS),
        weight_N=torch.full((CLIENTS,), float(FEW), dtype=torch.float64),
        rounds=rounds,
        valid=None,
    )
    state = average.init(Shared.of_flat(start))
    for r in range(rounds):
        state, _ = average.round(state, engine, r)
    (message,) = drain(
        engine, Job(work="test", shared=state.shared, version=rounds, clients=tuple(range(CLIENTS)), seed=0)
    )
    confusion = message.metrics["confusion"]
    return confusion.diagonal(dim1=1, dim2=2).sum(1) / message.metrics["count"]


def _broken(answers: Tree, *, says: int, instead: int) -> Tree:
    """A teacher that calls one class by another's name."""
    index = answers["answers.index"]
    return {**answers, "answers.index": torch.where(index == says, instead, torch.where(index == instead, says, index))}


def test_a_teacher_helps_students_with_ten_labels_and_a_broken_one_hurts_only_the_credulous(
    lesson: Lesson, tmp_path: Path
) -> None:
    school = lesson.school
    model = _students(school)
    train = Train(model, optimizer=ClientOptimizer("adamw", lr=8e-3))
    start, public = model.init(0), replace(school.own_words(school.parts["public"][0]), labels=np.full(PUBLIC, -100))
    judged = tuple(
        replace(school.own_words(s), answer=np.arange(JUDGED * c, JUDGED * c + JUDGED))
        for c, s in enumerate(school.parts["judged"])
    )
    judge = EvalSource(judged, batch_size=JUDGED, fixed_width=LENGTH)

    def run(name: str, work: ClientWork, answers: Tree | None) -> Tensor:
        return _federate(lesson, tmp_path / name, work, {**start, **(answers or {})}, public if answers else None)

    none = run("none", train, None)
    good = run("good", train, lesson.public)
    assert per_client_gain(good, none).mean > 0.04
    wrong, judged_wrong = (_broken(a, says=2, instead=0) for a in (lesson.public, lesson.judged))
    plain = run("plain", train, wrong)
    careful = run("careful", Selective(train, judge=judge, teacher_label_M=predicted_labels(judged_wrong)), wrong)
    assert per_client_gain(plain, none).mean < -0.08
    assert per_client_gain(careful, none).mean > -0.04
    assert per_client_gain(careful, plain).mean > 0.08


def test_a_student_distilled_at_the_server_begins_where_others_end(lesson: Lesson) -> None:
    school = lesson.school
    model = _students(school)
    public = replace(school.own_words(school.parts["public"][0]), labels=np.full(PUBLIC, -100))
    tree, log = pre_distil(
        model, Shared(model.init(0)), public, lesson.public, steps=80, lr=5e-3, seed=0, max_length=LENGTH
    )
    assert log[-1]["loss"] < log[0]["loss"]
    test = [school.own_words(s) for s in school.parts["test"]]
    right = [_accuracy(model, params, test) for params in (model.init(0), tree.trainable)]
    assert right[1] > right[0] + 0.05


def _accuracy(model: Any, params: Tree, shards: Sequence[TextShard]) -> float:
    source, right, count = EvalSource(shards, batch_size=TEST, fixed_width=LENGTH), 0, 0
    params_C = {name: x[None] for name, x in params.items()}
    for c in range(len(shards)):
        for batch in source.batches((c,), 0):
            said = model.logits(params_C, {}, batch).argmax(-1)
            right += int((said == batch["labels_CB"]).sum())
            count += int((batch["labels_CB"] >= 0).sum())
    return right / count


def test_a_students_layers_follow_minilm(lesson: Lesson) -> None:
    school = lesson.school
    model = TwoLayerTransformer(school.vocabulary, width=48, heads=4, classes=3, max_length=LENGTH)
    public = school.parts["public"][0].between(0, 96)
    tree, log = pre_distil(
        model,
        Shared(model.init(0)),
        replace(public, labels=np.full(96, -100)),
        {name: x[:96] for name, x in lesson.public.items()},
        layers=Layers({0: 0, 2: 6}, relation={2: 6}, kinds=("query", "key", "value"), heads=12),
        teacher=EncoderStates(school.encoder),
        words_V=school.words_V,
        pad=pad_id(school.tokenizer),
        max_length=LENGTH,
        steps=12,
        lr=8e-3,
        seed=0,
        batch=8,
        lines=4,
    )
    assert tree.trainable.keys() == model.init(0).keys()
    assert log[-1]["loss"] < 0.92 * log[0]["loss"]


def test_minmax_raises_the_worst_client_on_real_features(lesson: Lesson, tmp_path: Path) -> None:
    x, y = lesson.known.x, np.asarray(lesson.known.labels)
    by = [x[y == k] for k in range(3)]

    def shard(counts: tuple[int, int, int], at: int) -> ArrayShard:
        some = [by[k][at * 10 : at * 10 + n] for k, n in enumerate(counts)]
        return ArrayShard(np.concatenate(some), labels=np.repeat(np.arange(3), counts))

    # Five clients with good reviews, one whose are bad or mixed.
    shards = (*(shard((0, 2, 10), c) for c in range(5)), shard((8, 8, 0), 5))
    model = ImageMLP(384, hidden=(), classes=3)
    client_tasks = {
        "train": ClientTask(
            work=Train(model, optimizer=ClientOptimizer("sgd", lr=2.0)),
            source=TrainSource(shards, batch_size=16, steps=2),
        ),
        "test": ClientTask(work=Evaluate(model), source=EvalSource(shards, batch_size=16)),
    }
    average = Average(
        aggregator=Mean("uniform"),
        optimizer=ServerSGD(),
        sampler=Uniform(6),
        weight_N=torch.full((6,), 12.0, dtype=torch.float64),
        rounds=30,
        valid=None,
    )
    ends = {}
    for name, algorithm in {"mean": average, "minmax": AFL(average, rate=0.05)}.items():
        engine = LocalEngine(client_tasks, ClientStore(tmp_path / name))
        state = algorithm.init(Shared(model.init(0)))
        for r in range(30):
            state, _ = algorithm.round(state, engine, r)
        messages = drain(engine, Job(work="test", shared=state.shared, version=30, clients=tuple(range(6)), seed=0))
        losses = {
            int(c): float(loss / count)
            for m in messages
            for c, loss, count in zip(m.client_C, m.metrics["loss_sum"], m.metrics["count"], strict=True)
        }
        ends[name] = losses
    assert max(ends["minmax"].values()) < max(ends["mean"].values()) - 0.1
