"""Black-box answers: labels and probabilities leave, and nothing else of the teacher."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.clients.distillation.teacher_labels import Answer, AnswerWork, LocalTeacher, NoBatches
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import pack_message
from lichen.core.store import ClientStore
from lichen.fm.disclosure import DisclosurePolicy
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.fm.zero_shot import ZeroShot
from lichen.models.loading.load import load_causal
from support.openai_server import answering
from support.tiny_llama import save_model
from support.toy_cohorts import job

CLASSES = ("bad", "fair", "good")


def classify(texts: Sequence[str]) -> Any:
    return torch.tensor([[len(text), text.count("a"), 1.0] for text in texts])


def ask(teacher: Any, texts: Sequence[str], tmp_path: Path, **more: Any) -> Any:
    work = AnswerWork(teacher, **{"classes": CLASSES, "top_k": 2, **more})
    asked = job({}, [3, 8], work="answer", texts=tuple(texts))
    return list(serve(asked, {"answer": ClientTask(work=work, source=NoBatches())}, ClientStore(tmp_path)))


def test_answers_are_the_classifiers_own_top_classes(tmp_path: Path) -> None:
    texts = ["banana", "", "aaa", "x"]
    messages = ask(LocalTeacher(classify, classes=CLASSES, top_k=2, batch=3), texts, tmp_path)
    assert [m.client_C.tolist() for m in messages] == [[3], [8]]
    message = messages[0]
    chances = classify(texts).double().softmax(-1)
    prob, index = chances.sort(dim=-1, descending=True, stable=True)
    assert set(message.tensors) == {"index", "prob"}
    assert message.tensors["index"].dtype == torch.int8
    assert message.tensors["prob"].dtype == torch.float16
    assert torch.equal(message.tensors["index"][0].long(), index[:, :2])
    assert torch.equal(message.tensors["prob"][0], prob[:, :2].half())
    assert message.weight_C.tolist() == [4]
    assert message.texts == ()


def test_bytes_grow_by_three_per_answer_and_many_classes_take_sixteen_bits(tmp_path: Path) -> None:
    teacher = LocalTeacher(classify, classes=CLASSES, top_k=2)
    few, many = (len(pack_message(ask(teacher, ["x"] * n, tmp_path)[0])) for n in (100, 1100))
    assert abs(many - few - 1000 * 2 * 3) < 16
    names = tuple(f"c{i}" for i in range(300))
    wide = LocalTeacher(lambda texts: torch.arange(300.0).repeat(len(texts), 1), classes=names, top_k=1)
    message = ask(wide, ["x"], tmp_path, classes=names, top_k=1)[0]
    assert message.tensors["index"].dtype == torch.int16
    assert message.tensors["index"].tolist() == [[[299]]]


def test_nothing_but_answers_is_reachable() -> None:
    teacher = LocalTeacher(classify, classes=CLASSES, top_k=1)
    assert [name for name in dir(teacher) if not name.startswith("_")] == ["answer"]
    assert not hasattr(teacher, "__dict__")
    assert [f.name for f in dataclasses.fields(Answer) if f.name != "_"] == ["label", "top"]
    (answer,) = teacher.answer(["banana"])
    assert type(answer.label) is str
    assert [(type(label), type(p)) for label, p in answer.top] == [(str, float)]
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(teacher)


class LabeledAnswer:
    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def answer(self, texts: Sequence[str]) -> Any:
        return self.answers


def test_odd_answers_become_unknown_and_do_not_stop_the_round(tmp_path: Path) -> None:
    nan = float("nan")
    said = LabeledAnswer(Answer("good"), Answer("who knows"), Answer("fair", top=(("fair", nan), ("bad", 0.25))))
    message = ask(said, ["a", "b", "c"], tmp_path)[0]
    assert message.tensors["index"].tolist() == [[[2, -1], [-1, -1], [-1, 0]]]
    assert message.tensors["prob"].tolist() == [[[1, 0], [0, 0], [0, 0.25]]]
    assert message.metrics["unknown"].tolist() == [2]


def test_refuses_a_miscounting_teacher_and_nonsense(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="1 answers to 2 texts"):
        ask(LabeledAnswer(Answer("good")), ["a", "b"], tmp_path)
    with pytest.raises(LichenError, match="top_k"):
        AnswerWork(LabeledAnswer(), classes=CLASSES, top_k=4)
    with pytest.raises(LichenError, match="named twice"):
        LocalTeacher(classify, classes=("a", "a"), top_k=1)
    work = AnswerWork(LabeledAnswer(), classes=CLASSES)
    with pytest.raises(LichenError, match="several clients"):
        work.final(work.init(job({}, [1, 2]), [1, 2], None))


def test_a_black_box_teacher_is_the_same_over_http(tmp_path: Path) -> None:
    """The same answers in the same bytes, a fifth of the calls failing."""
    model = load_causal(save_model(tmp_path / "tiny"))
    texts = [f"w{n} w{2 * n % 40}" for n in range(20)]
    words = {"bad": " w10", "fair": " w11", "good": " w12"}

    def told(fm: Any, where: Any) -> Any:
        teacher = ZeroShot(fm, template="w30 {text} w31", words=words, free=("w0",))
        return ask(teacher, texts, tmp_path / where, top_k=3)[0]

    local = told(LocalFM(*model), "local")
    with answering(*model, fail=0.2, stall=0.5) as (url, seen):
        endpoint = Endpoint(url=url, model="tiny", top=46, timeout=0.4, pause=0.001, max_retries=9)
        flow = DisclosurePolicy(HttpFM(endpoint))
        remote = told(flow.of("public"), "remote")
    assert seen.failed > 2
    assert torch.equal(remote.tensors["index"], local.tensors["index"])
    torch.testing.assert_close(remote.tensors["prob"].float(), local.tensors["prob"].float(), rtol=0, atol=2e-3)
    assert len(pack_message(remote)) == len(pack_message(local))
    # Two clients asked; each time the one text without content was asked too.
    assert flow.sent["public"].texts == 2 * (20 + 1)
