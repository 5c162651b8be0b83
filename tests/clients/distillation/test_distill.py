"""A student distilled on public rows: equal to a plain loop, deterministic, and helpers stay behind.

Legend: C clients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lichen.clients.distillation.distill import Distill, pre_distil, public_source
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.tree import digest
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import TextShard
from lichen.models.layerwise_distillation import EncoderStates, Layers, Layerwise
from lichen.models.losses import answer_settings
from lichen.models.students.students import TextCNN, TwoLayerTransformer

ROWS = 48


def _public(labels: int = -100) -> tuple[TextShard, dict[str, torch.Tensor]]:
    """Rows whose class is which of three signal tokens they hold, and a teacher that is right, 0.9 sure."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, ROWS)
    rows = [rng.integers(10, 40, rng.integers(4, 9)).astype(np.int32) for _ in range(ROWS)]
    for row, k in zip(rows, kind, strict=True):
        row[rng.integers(0, len(row))] = k + 1
    shard = TextShard(rows, labels=np.full(ROWS, labels, np.int64), kind="classify")
    answers = {
        "answers.prob": torch.full((ROWS, 1), 0.9, dtype=torch.float16),
        "answers.index": torch.from_numpy(kind)[:, None].to(torch.int8),
    }
    return shard, answers


@pytest.fixture(scope="module")
def teacher() -> Any:
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
        )
        return EncoderStates(BertModel(config, add_pooling_layer=False).eval().requires_grad_(False))


def _accuracy(model: Any, tree: dict[str, torch.Tensor], public: TextShard, answers: dict[str, torch.Tensor]) -> float:
    source, right = public_source(public, batch=ROWS, steps=1), 0
    for batch in source.batches((0,), 1):
        said = model.logits({n: x[None] for n, x in tree.items()}, {}, batch)[0].argmax(-1)
        right += int((said == answers["answers.index"][batch["answer_CB"][0], 0]).sum())
    return right / ROWS


def test_equals_a_plain_loop_of_torchs_adamw() -> None:
    public, answers = _public()
    model = TextCNN(40, width=6, classes=3)
    start = model.init(0)
    tree, log = pre_distil(
        model,
        Shared.of_flat(start),
        public,
        answers | answer_settings(temperature=2.0),
        steps=7,
        lr=0.01,
        seed=4,
        batch=8,
    )
    leaves = {name: x.clone().requires_grad_() for name, x in start.items()}
    stepper = torch.optim.AdamW(leaves.values(), lr=0.01, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, T_max=7)
    losses = []
    for batch in public_source(public, batch=8, steps=7).batches((0,), 4):
        logits = model.apply(leaves, batch["input_ids_CBT"][0], batch["attention_mask_CBT"][0])
        target = torch.full((8, 3), 0.05)
        target.scatter_(1, answers["answers.index"][batch["answer_CB"][0]].long(), 0.9)
        soft = target.sqrt() / target.sqrt().sum(1, keepdim=True)
        loss = -4 * (soft * (logits / 2).log_softmax(-1)).sum(1).mean()
        stepper.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        stepper.step()
        scheduler.step()
        losses.append(loss.item())
    for name, x in leaves.items():
        torch.testing.assert_close(tree.trainable[name], x.detach(), rtol=2e-3, atol=2e-4)
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-3)
    assert [line["step"] for line in log] == list(range(1, 8))


def test_a_student_learns_from_answers_alone_and_the_log_falls() -> None:
    public, answers = _public()
    model = TextCNN(40, width=8, classes=3)
    start = {**model.init(0), "answers.prob": torch.zeros(1, 1)}
    first = pre_distil(model, Shared.of_flat(start), public, answers, steps=40, lr=0.02, seed=0, batch=16, lines=5)
    tree, log = first
    assert len(log) == 5
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert tree.flat().keys() == start.keys()
    assert torch.equal(tree.frozen["answers.prob"], start["answers.prob"])
    assert _accuracy(model, tree.trainable, public, answers) > 0.9
    again, _ = pre_distil(model, Shared.of_flat(start), public, answers, steps=40, lr=0.02, seed=0, batch=16)
    assert digest(again.flat()) == digest(tree.flat())


def test_layers_alone_teach_and_the_projection_stays_behind(teacher: EncoderStates) -> None:
    public, answers = _public()
    model = TwoLayerTransformer(40, width=16, heads=2, classes=3, max_length=16)
    start, layers = model.init(0), Layers({2: 2}, relation={2: 2})
    tree, log = pre_distil(
        model,
        Shared.of_flat(start),
        public,
        {},
        layers=layers,
        teacher=teacher,
        steps=30,
        lr=0.01,
        seed=0,
        batch=16,
        lines=6,
    )
    assert tree.trainable.keys() == start.keys()
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    # Nothing taught the head; everything below it followed.
    assert torch.equal(tree.trainable["head.weight"], start["head.weight"])
    assert not torch.equal(tree.trainable["layer1.qkv.weight"], start["layer1.qkv.weight"])
    both, _ = pre_distil(
        model,
        Shared.of_flat(start),
        public,
        answers,
        layers=layers,
        teacher=teacher,
        steps=60,
        lr=0.01,
        seed=0,
        batch=16,
    )
    assert _accuracy(model, both.trainable, public, answers) > 0.9


def test_as_a_clients_work_the_job_brings_no_answers(teacher: EncoderStates) -> None:
    public, answers = _public()
    student = TwoLayerTransformer(40, width=16, heads=2, classes=3, max_length=16)
    model = Layerwise(student, teacher, Layers({1: 1}))
    work = Distill(
        Train(model, optimizer=ClientOptimizer("sgd", lr=0.1)), answers=answers, helpers=model.projections(0)
    )
    job = Job(work="distill", shared=Shared(student.init(0)), version=3, clients=(0,), seed=1)
    state = work.init(job, (0,), None)
    for batch in public_source(public, batch=8, steps=2).batches((0,), 1):
        state = work.step(state, batch)
    message, own = work.final(state)
    assert own is None
    assert message.tensors.keys() == student.init(0).keys()
    assert message.weight_C.tolist() == [16]
    assert float(message.tensors["head.weight"].abs().max()) > 0


def test_nonsense_is_refused(teacher: EncoderStates) -> None:
    public, answers = _public()
    model = TextCNN(40, width=4, classes=3)
    usual: dict[str, Any] = {"steps": 3, "lr": 0.1, "seed": 0}
    with pytest.raises(LichenError, match="nothing to learn"):
        pre_distil(model, Shared(model.init(0)), public, {}, **usual)
    with pytest.raises(LichenError, match="come together"):
        pre_distil(model, Shared(model.init(0)), public, answers, layers=Layers({1: 1}), **usual)
    with pytest.raises(LichenError, match="cannot be seen"):
        pre_distil(model, Shared(model.init(0)), public, answers, layers=Layers({1: 1}), teacher=teacher, **usual)
    with pytest.raises(LichenError, match="diverged"):
        pre_distil(
            model, Shared.of_flat({n: x * torch.inf for n, x in model.init(0).items()}), public, answers, **usual
        )
    with pytest.raises(LichenError, match="is no answer"):
        Distill(Train(model), answers={"prob": torch.zeros(1)})
    with pytest.raises(LichenError, match="left behind"):
        Distill(Train(model, personal=True), helpers={"project.1.weight": torch.zeros(1)})
