"""Every client work declares its messages: each honest one is admitted, in every round, with and without rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from lichen import fl
from lichen.clients.distillation.distill import Distill
from lichen.clients.distillation.predict import Predict
from lichen.clients.distillation.private_models import LocalInit
from lichen.clients.distillation.selective import Selective
from lichen.clients.distillation.teacher_labels import AnswerWork, LocalTeacher, NoBatches
from lichen.clients.evaluation.early_stopping import KeepBest
from lichen.clients.statistics.closed_head import HeadConfusion, OwnHead
from lichen.clients.statistics.declare import Declare
from lichen.clients.statistics.leakage import Leakage
from lichen.clients.statistics.nearest_vote import NearestNeighborHistogram
from lichen.clients.statistics.sufficient import Statistics
from lichen.clients.training.corrections.feddyn import FedDyn
from lichen.clients.training.corrections.fednova import Reach
from lichen.clients.training.diloco import Worker
from lichen.clients.training.fedbpt import BlackBox
from lichen.clients.training.fix_and_mix import FixAndMix
from lichen.clients.training.fixmatch import FixMatch
from lichen.clients.training.kseed import FedKSeed, ReplayedWork
from lichen.clients.training.kseed_replay import KSeedReplay
from lichen.clients.training.mezo import ZerothOrder
from lichen.clients.training.row_weights import ByRows
from lichen.core.wire.shared import Shared
from lichen.data.batches.augment_images import ImageViews
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.fl.testing import check_expected
from lichen.models.full import FullCausal
from lichen.models.objectives import NextToken, RowLoss
from lichen.models.tokens.token_targets import DistilledLM
from lichen.research.gkt.features import FeatureUpload
from lichen.research.gkt.stitched import Stem
from lichen.research.mutual.token_distill import DistillLogits
from lichen.research.mutual.token_logits import ReportLogits, public_shard
from lichen.research.mutual.train_then_report import TrainThenReport, TrainThenReportSource
from lichen.research.mutual.vocabulary import Vocabulary
from lichen.research.pate.label_vote import LabelVote
from lichen.research.prompts.prompt_search import TokenSearch
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transformed
from lichen.transforms.uplink import Coded
from support.toy_cohorts import LoraLinear
from support.two_tokenizers import TEXTS, model, tokenizer

CLIENTS, FEATURES, CLASSES = (0, 1, 2), 4, 3
MLP = fl.ImageMLP(FEATURES, hidden=(5,), classes=CLASSES)
LORA = LoraLinear(features=FEATURES, classes=CLASSES)
SGD = fl.ClientOptimizer("sgd", lr=0.1)


def shard(client: int, rows: int = 9) -> fl.ArrayShard:
    draw = np.random.default_rng(client)
    x = draw.normal(size=(rows, FEATURES)).astype(np.float32)
    return fl.ArrayShard(x, labels=draw.integers(0, CLASSES, rows))


OWN = [shard(client) for client in CLIENTS]
PUBLIC = shard(9)
TAUGHT = [replace(one, answer=np.arange(9)) for one in OWN]
TAUGHT_STEPS, TAUGHT_ROWS = fl.TrainSource(TAUGHT, batch_size=4, steps=2), fl.EvalSource(TAUGHT, batch_size=4)
BARE = ScarceLabels(
    fl.TrainSource({c: replace(shard(c), labels=np.full(9, -100)) for c in CLIENTS}, batch_size=1, steps=2),
    unlabelled_rows=4,
    replacement=True,
)
STEPS, ROWS = fl.TrainSource(OWN, batch_size=4, steps=2), fl.EvalSource(OWN, batch_size=4)
EVERYBODYS = fl.EvalSource(dict.fromkeys(CLIENTS, PUBLIC), batch_size=4)
ANSWERS = {"answers.prob": torch.ones(9, 1), "answers.index": torch.arange(9)[:, None] % CLASSES}
LM = FullCausal(model(300), name="full")
TOLD = public_shard(TEXTS, tokenizer(300))
TOLD_ROWS = fl.EvalSource(dict.fromkeys(CLIENTS, TOLD), batch_size=4)
REPLAY = KSeedReplay(MLP.init(0), lr=1e-3, root=1, count=64)


@dataclass(frozen=True)
class Searched:
    """A loss that hangs on whatever tensors a search has."""

    start: tuple[tuple[str, torch.Tensor], ...]
    name: str = "searched"
    base: str = ""
    group: str = "searched"
    classes: None = None
    objective = NextToken()
    reference: bool = True

    def init(self, seed: int) -> Any:
        return dict(self.start)

    def loss(self, trainable_C: Any, fixed: Any, batch: Any) -> Any:
        total_C = sum(x.double().flatten(1).square().sum(1) for x in trainable_C.values())
        return total_C, (batch["index_CB"] >= 0).sum(1)


BOWL = Searched((("mean", torch.zeros(4)), ("std", torch.ones(4, dtype=torch.float16))))
DEEP = Searched((("h.0.w", torch.ones(2)), ("h.1.w", torch.ones(3))))
WORDS = Searched((("choice", torch.full((2, 3), 1 / 3)),))


def train(model: Any = MLP, **more: Any) -> fl.Train:
    return fl.Train(model, optimizer=SGD, **more)


def report() -> ReportLogits:
    return ReportLogits(LM, public=TOLD, vocabulary=Vocabulary.of(tokenizer(300)), top_k=2, personal=True)


def listening(*, personal: bool) -> DistillLogits:
    return DistillLogits(train(DistilledLM(LM), personal=personal), public=TOLD)


def told(rows: int) -> fl.Tree:
    return {"answers.index": torch.zeros(rows, 2, dtype=torch.int16), "answers.prob": torch.ones(rows, 2).half() / 2}


Case = tuple[Any, Any, fl.Tree]
CASES: dict[str, Callable[[], Case]] = {
    "train": lambda: (train(), STEPS, MLP.init(0)),
    "train, one": lambda: (train(weigh_by="one"), STEPS, MLP.init(0)),
    "train, tokens": lambda: (train(weigh_by="tokens"), STEPS, MLP.init(0)),
    "train, answers": lambda: (train(), TAUGHT_STEPS, {**MLP.init(0), **ANSWERS}),
    "train, personal": lambda: (train(personal=True), STEPS, MLP.init(0)),
    "train, halves by turns": lambda: (
        train(LORA, freeze_schedule=(("lora_A",), ("lora_B",), ())),
        STEPS,
        LORA.init(0),
    ),
    "train, a half at home": lambda: (train(LORA, local_params=("lora_B",)), STEPS, LORA.init(0)),
    "train, gradient steps": lambda: (train(gradient_steps=(fl.Clip(1.0), fl.Proximal(0.1))), STEPS, MLP.init(0)),
    "train, scaffold": lambda: (
        train(LORA, gradient_steps=(fl.Scaffold(0.1),), freeze_schedule=(("lora_A",), ())),
        STEPS,
        {**LORA.init(0), **{f"control.{name}": torch.zeros_like(x) for name, x in LORA.init(0).items()}},
    ),
    "train, feddyn": lambda: (train(gradient_steps=(FedDyn(0.1),)), STEPS, MLP.init(0)),
    "train, fednova": lambda: (train(gradient_steps=(Reach(lr=0.1),)), STEPS, MLP.init(0)),
    "train, real numbers": lambda: (train(REAL), STEPS, REAL.init(0)),
    "train, a loss that is none": lambda: (train(no_number()), STEPS, MLP.init(0)),
    "evaluate": lambda: (fl.Evaluate(MLP), ROWS, MLP.init(0)),
    "evaluate, real numbers": lambda: (fl.Evaluate(REAL), ROWS, REAL.init(0)),
    "evaluate, astray": lambda: (fl.Evaluate(MLP), ROWS, {n: x * 1e18 for n, x in MLP.init(0).items()}),
    "evaluate, no number": lambda: (fl.Evaluate(REAL), ROWS, {n: x * torch.nan for n, x in REAL.init(0).items()}),
    "keep best": lambda: (KeepBest(MLP), ROWS, MLP.init(0)),
    "diloco": lambda: (Worker(train(DEEP), fragments=2, drop=0.5), STEPS, DEEP.init(0)),
    "mezo": lambda: (ZerothOrder(LORA, lr=0.1, freeze_schedule=(("lora_A",),)), STEPS, LORA.init(0)),
    "kseed": lambda: (FedKSeed(MLP, REPLAY, steps=2), STEPS, REPLAY.shared()),
    "kseed, evaluate": lambda: (ReplayedWork(fl.Evaluate(MLP), REPLAY), ROWS, REPLAY.shared()),
    "black box": lambda: (BlackBox(BOWL), STEPS, BOWL.init(0)),
    "fixmatch": lambda: (
        FixMatch(train(), ImageViews(side=2), threshold=0.1, rows=9, unlabelled=[9] * 9),
        STEPS,
        MLP.init(0),
    ),
    "fix and mix": lambda: (FixAndMix(train(), ImageViews(side=2), BARE, threshold=0.1), BARE, MLP.init(0)),
    "distill": lambda: (
        Distill(train(), answers=ANSWERS, helpers={"layer0.weight": MLP.init(0)["layer0.weight"]}),
        TAUGHT_STEPS,
        {n: x for n, x in MLP.init(0).items() if n != "layer0.weight"},
    ),
    "selective": lambda: (
        Selective(train(), judge=TAUGHT_ROWS, teacher_label_M=torch.arange(9) % CLASSES),
        TAUGHT_STEPS,
        {**MLP.init(0), **ANSWERS},
    ),
    "predict": lambda: (Predict(MLP, rows=9), EVERYBODYS, MLP.init(0)),
    "predict, best two": lambda: (Predict(MLP, rows=9, top_k=2, personal=True), EVERYBODYS, MLP.init(0)),
    "predict, counts": lambda: (
        Predict(MLP, rows=9, counts=dict.fromkeys(CLIENTS, (4, 0, 5))),
        EVERYBODYS,
        MLP.init(0),
    ),
    "local init": lambda: (LocalInit(train(), start=Shared(MLP.init(0))), STEPS, {}),
    "answers": lambda: (
        AnswerWork(
            LocalTeacher(lambda texts: torch.zeros(len(texts), 2), classes=("a", "c"), top_k=2),
            classes=("a", "b"),
            top_k=2,
        ),
        NoBatches(),
        {},
    ),
    "declare": lambda: (
        Declare(fl.Roster(tuple(fl.Member(name=n, rows={"train": 3}, group="g" * (n == "a")) for n in "abc"))),
        NoBatches(),
        {},
    ),
    "leakage": lambda: (Leakage(lambda client: ["one text of a client"] * client), NoBatches(), {}),
    "votes": lambda: (
        NearestNeighborHistogram(lambda batch: batch["x_CBF"], report=True),
        ROWS,
        {"candidates": torch.randn(5, FEATURES), "labels": torch.arange(5) % CLASSES},
    ),
    "votes, noise": lambda: (
        NearestNeighborHistogram(lambda batch: batch["x_CBF"], bits=10, clip=2.0, noise=1.0),
        ROWS,
        {"candidates": torch.randn(5, FEATURES)},
    ),
    "statistics": lambda: (Statistics(lambda batch: batch["x_CBF"], classes=CLASSES, width=FEATURES), ROWS, {}),
    "own head": lambda: (
        OwnHead(
            Statistics(lambda batch: batch["x_CBF"], classes=CLASSES, width=FEATURES),
            lambda message: {"head.weight": message.tensors["H"][0], "head.bias": message.tensors["n"][0]},
        ),
        ROWS,
        {},
    ),
    "head confusion": lambda: (
        HeadConfusion(lambda batch: batch["x_CBF"], classes=CLASSES),
        ROWS,
        {"head.weight": torch.randn(CLASSES, FEATURES), "head.bias": torch.zeros(CLASSES)},
    ),
    "by rows": lambda: (ByRows(train(), (9, 9, 20)), STEPS, MLP.init(0)),
    "ballot": lambda: (LabelVote(MLP, queries=9), EVERYBODYS, MLP.init(0)),
    "features": lambda: (FeatureUpload(STEM), SERVED_ALONE, STEM.init(0)),
    "words": lambda: (TokenSearch(WORDS, samples=3, elite=1), STEPS, WORDS.init(0)),
    "train and report": lambda: (
        TrainThenReport(train(LM, personal=True), report=report()),
        TrainThenReportSource(fl.TrainSource([TOLD] * 3, batch_size=2, steps=1), public=TOLD_ROWS),
        LM.init(0),
    ),
    "listen": lambda: (
        listening(personal=False),
        fl.TrainSource([TOLD] * 3, batch_size=2, steps=1),
        {**LM.init(0), **told(int(sum((np.asarray(y)[1:] != -100).sum() for y in TOLD.labels)))},
    ),
}
for words in ([], ["int8"], ["sign"], ["topk:1/4", "int4~"], ["sketch:1", "int8"]):
    CASES[f"coded {' '.join(words)}"] = lambda words=words: (  # type: ignore[misc]
        Transformed(train(LORA, freeze_schedule=(("lora_A",), ())), (Coded(parse_codecs(words)),)),
        STEPS,
        LORA.init(0),
    )


def squared(outputs_RK: torch.Tensor, label_R: torch.Tensor) -> torch.Tensor:
    return (outputs_RK[:, 0] - label_R).square()


REAL = fl.ImageMLP(
    FEATURES,
    hidden=(5,),
    classes=1,
    objective=RowLoss(
        squared, more={"error": lambda x_RK, y_R: x_RK[:, 0] - y_R}, ranges={"loss_sum": fl.MetricSpec(0.0)}
    ),
)
STEM = Stem(FEATURES, widths=(3,), classes=CLASSES)


@dataclass(frozen=True)
class Alone:
    """A source whose clients stand side by side with nobody."""

    inner: Any

    def shape(self, client: int) -> Any:
        return client

    def batches(self, clients: Any, seed: int) -> Any:
        return self.inner.batches(clients, seed)


SERVED_ALONE = Alone(ROWS)


def no_number() -> Any:
    """A model whose loss is no number."""

    class NoNumber(type(MLP)):  # type: ignore[misc]
        def loss(self, trainable_C: Any, fixed: Any, batch: Any) -> Any:
            loss_C, count_C = super().loss(trainable_C, fixed, batch)
            return loss_C * torch.nan, count_C

    return NoNumber(FEATURES, hidden=(5,), classes=CLASSES)


@pytest.mark.parametrize("name", CASES)
def test_honest_messages_are_admitted(name: str) -> None:
    work, source, shared = CASES[name]()
    texts = ("a text", "another") if name in ("answers", "leakage") else ()
    job = fl.Job(work="w", shared=Shared.of_flat(shared), version=0, clients=CLIENTS, seed=5, texts=texts)
    check_expected(fl.ClientTask(work=work, source=source), job)


class Liar:
    """Says one thing and sends another."""

    def __init__(self, inner: Any, **lies: Any) -> None:
        self.inner, self.lies = inner, lies

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def expected(self, job: fl.Job) -> fl.Expected:
        return replace(self.inner.expected(job), **self.lies)


@pytest.mark.parametrize(
    ("lies", "says"),
    [
        ({"group": "another"}, "group: client 0 is of group"),
        ({"tensors": {}}, "names: client 0 brings tensor"),
        ({"metrics": {}}, "names: client 0 brings metric"),
        ({"weight": (0.0, 1.0)}, "weight: client 0 weighs 8"),
    ],
)
def test_the_law_finds_a_wrong_declaration(lies: Any, says: str) -> None:
    task = fl.ClientTask(work=Liar(train(), **lies), source=STEPS)
    with pytest.raises(AssertionError, match=says):
        check_expected(task, fl.Job(work="w", shared=Shared(MLP.init(0)), version=0, clients=CLIENTS, seed=5))


def test_a_declaration_costs_microseconds_and_copies_nothing() -> None:
    big = {f"layer{i}.weight": torch.empty(1 << 12, 1 << 12, device="meta") for i in range(100)}
    job = fl.Job(work="w", shared=Shared.of_flat(big), version=0, clients=CLIENTS, seed=5)
    expected = Transformed(train(), (Coded(parse_codecs(["int8"])),)).expected(job)
    (spec,) = expected.tensors.values()
    assert spec.shape[0] > 100 << 24
