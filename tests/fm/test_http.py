"""Texts, vectors and answers through an endpoint are those of the model behind it.

Legend: N prompts, K choices, H width.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.fm.zero_shot import ZeroShot
from lichen.models.loading.load import load_causal
from support.openai_server import answering
from support.tiny_llama import save_model

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
CHOICES = (" w10", " w11", " w12")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_causal(save_model(tmp_path_factory.mktemp("tiny")))


@pytest.mark.parametrize("ask", ["first", "chat", "text"])
def test_texts_are_those_of_the_model_behind(tiny: tuple[Any, Any], ask: Any) -> None:
    local = LocalFM(*tiny, chat=ask != "first")
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.9, "top_p": 0.8}
    whole = local.generate(PROMPTS, seeds=[1, 2, 3], **settings)
    stop = [f"no-{n}" for n in range(5)] + [whole[0].split()[2]]  # the one that counts is not sent: four are
    with answering(*tiny) as (url, told):
        fm = HttpFM(Endpoint(url=url, model="tiny", ask=ask, concurrency=2))
        assert fm.generate(PROMPTS, seeds=[1, 2, 3], **settings) == whole
        cut = fm.generate(PROMPTS[:1], seeds=[1], **settings, stop=stop)
    assert cut == [whole[0][: whole[0].index(stop[-1])]]
    assert sorted(body["seed"] for body in told.bodies[:3]) == [1, 2, 3]
    assert told.bodies[3]["stop"] == stop[:4]
    assert {"model", "max_tokens", "temperature", "top_p", "seed"} < told.bodies[0].keys()
    assert (fm.usage.calls, fm.usage.tokens_in, fm.usage.tokens_out) == (4, 12, 8)


def test_a_written_text_is_kept_with_its_settings_in_the_key(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    with answering(*tiny) as (url, told):
        endpoint = Endpoint(url=url, model="tiny", cache=tmp_path)
        first = HttpFM(endpoint).generate(PROMPTS, seeds=[1, 2, 3], max_new_tokens=5)
        again = HttpFM(endpoint)
        assert again.generate(PROMPTS, seeds=[1, 2, 3], max_new_tokens=5) == first
        assert (again.usage.calls, again.usage.cached, len(told.bodies)) == (0, 3, 3)
        for more in ({"seeds": [4]}, {"max_new_tokens": 4}, {"temperature": 0.5}, {"top_p": 0.5}, {"stop": ("w1",)}):
            again.generate(PROMPTS[:1], **{"seeds": [1], "max_new_tokens": 5, **more})
        assert len(told.bodies) == 8
    kept = [json.loads(file.read_text()) for file in tmp_path.rglob("*.json")]
    assert {one["asked"]["prompt"] for one in kept} == set(PROMPTS)
    assert all(one["from"]["endpoint"] == url and one["from"]["date"] for one in kept)


def test_vectors_come_many_a_call_in_any_order(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    texts = [f"w{n}" for n in range(7)] + ["w0"]
    with answering(*tiny) as (url, told):
        endpoint = Endpoint(url=url, model="none", embedder="tiny", batch=3, cache=tmp_path)
        fm = HttpFM(endpoint)
        told_NH = fm.embed(texts)
        assert [len(body["input"]) for body in told.bodies] == [3, 3, 1]
        again = HttpFM(endpoint)
        assert torch.equal(again.embed(texts), told_NH)
        assert (again.usage.calls, again.usage.cached) == (0, 7)
    torch.testing.assert_close(told_NH, LocalFM(*tiny).embed(texts), rtol=0, atol=1e-6)
    assert fm.usage.calls == 3


def test_answers_are_those_of_the_model_behind(tiny: tuple[Any, Any]) -> None:
    with answering(*tiny) as (url, _):
        fm = HttpFM(Endpoint(url=url, model="tiny", top=46))
        chance_NK = fm.answer(PROMPTS, CHOICES)
        assert fm.answer([], CHOICES).shape == (0, 3)
    torch.testing.assert_close(chance_NK, LocalFM(*tiny).answer(PROMPTS, CHOICES), rtol=0, atol=1e-5)


def test_without_probabilities_an_endpoint_is_asked_in_words(tiny: tuple[Any, Any]) -> None:
    said = LocalFM(*tiny, chat=True).generate(PROMPTS, seeds=[0] * 3, max_new_tokens=8 + 4, temperature=0)
    (first, *_) = said[0].split()
    with answering(*tiny) as (url, told):
        fm = HttpFM(Endpoint(url=url, model="tiny", ask="text"))
        chance_NK = fm.answer(PROMPTS, (f" {first}", " zzz"))
        with pytest.raises(LichenError, match="no log-probabilities"):
            fm.score(PROMPTS, [CHOICES] * 3)
    assert {(body["temperature"], body["seed"]) for body in told.bodies} == {(0.0, 0)}
    named = [first in text.split() for text in said]
    assert named[0]
    assert chance_NK.tolist() == [[1.0, 0.0] if hit else [0.5, 0.5] for hit in named]
    assert fm.usage.missed == named.count(False)


@pytest.mark.parametrize("seed", [0, 1])
def test_everything_survives_a_fifth_of_the_calls_failing(tiny: tuple[Any, Any], seed: int) -> None:
    local = LocalFM(*tiny)
    prompts = [f"w{n} w{n + seed + 1}" for n in range(24)]
    with answering(*tiny, fail=0.2, stall=0.5) as (url, told):
        endpoint = Endpoint(
            url=url, model="tiny", top=46, timeout=0.4, pause=0.001, max_retries=9, concurrency=4, batch=2
        )
        fm = HttpFM(endpoint)
        assert fm.generate(prompts, seeds=range(24), max_new_tokens=5) == local.generate(
            prompts, seeds=range(24), max_new_tokens=5
        )
        torch.testing.assert_close(fm.embed(prompts), local.embed(prompts), rtol=0, atol=1e-6)
        torch.testing.assert_close(fm.answer(prompts, CHOICES), local.answer(prompts, CHOICES), rtol=0, atol=1e-5)
    assert told.failed > 5
    assert fm.usage.retries >= told.failed
    assert fm.usage.calls == 24 + 12 + 24


def test_an_endpoint_of_another_kind_is_named(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fm = HttpFM(Endpoint(url="http://127.0.0.1:9/v1", model="tiny"))
    for told, do, match in (
        ({"choices": []}, lambda: fm.generate(["w1"], seeds=[1]), "another format"),
        ({"choices": [{"text": None}]}, lambda: fm.generate(["w1"], seeds=[1]), "writes no text"),
        ({"data": [{"index": 4, "embedding": [1.0]}]}, lambda: fm.embed(["w1"]), "no vectors"),
        ({"choices": [{"text": "a"}]}, lambda: fm.score(["w1"], [CHOICES]), "no log-probabilities"),
    ):
        monkeypatch.setattr(fm._caller, "post", lambda *_, told=told: told)
        with pytest.raises(LichenError, match=match):
            do()


@pytest.mark.skipif(
    "LICHEN_ENDPOINT_PYTHON" not in os.environ, reason="no endpoint package; see benchmarks/endpoint.py"
)
def test_a_real_endpoint_writes_embeds_and_answers(tmp_path: Path) -> None:
    from endpoint import serving

    texts = ["I love this dress.", "It fell apart at once.", "Perfect fit.", "Terrible, I sent it back."]
    with serving(os.environ["LICHEN_ENDPOINT_PYTHON"]) as url:
        fm = HttpFM(Endpoint(url=url, model="smollm2", top=1000, cache=tmp_path))
        greedy = fm.generate(["The capital of France is"], seeds=[0], max_new_tokens=6, temperature=0)
        drawn = fm.generate(["A dress"] * 3, seeds=[1, 1, 2], max_new_tokens=8)
        cut = fm.generate(["1, 2, 3, 4,"], seeds=[0], max_new_tokens=12, temperature=0, stop=("7",))
        teacher = ZeroShot(
            fm,
            template="Review: {text}\nSentiment:",
            words={"bad": " negative", "good": " positive"},
            free=("N/A",),
        )
        labels = [answer.label for answer in teacher.answer(texts)]
    with serving(os.environ["LICHEN_ENDPOINT_PYTHON"], embedding=True) as url:
        vectors_NH = HttpFM(Endpoint(url=url, model="smollm2")).embed([*texts, texts[0]])
    assert "Paris" in greedy[0]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "6" in cut[0]
    assert "7" not in cut[0]
    assert labels == ["good", "bad", "good", "bad"]
    torch.testing.assert_close(vectors_NH.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(vectors_NH[0], vectors_NH[4], rtol=0, atol=1e-3)
    assert float(vectors_NH[0] @ vectors_NH[1]) < 0.999
