"""One face, three ways to ask: a local model and an endpoint give the same numbers.

Legend: N prompts, K continuations, P positions, H width, V vocabulary.
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
from lichen.fm.soft_prompt import SoftPrompt
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import load_causal
from lichen.research.prompts.word_prompt import WordPrompt, decode_bytes, encode_bytes
from support.openai_server import answering
from support.tiny_llama import save_model

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
WORDS = (" w10", " w11", " w12 w13")
ONE = WORDS[:2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_causal(save_model(tmp_path_factory.mktemp("tiny")))


def plain(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """One text, one call, no padding: the oracle."""
    ids = tokenizer(prompt + text)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logp[t - 1, ids[t]]) for t in range(start, len(ids)))


def test_local_scores_are_those_of_one_text_at_a_time(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny, batch=2)
    score_NK = fm.score(PROMPTS, [WORDS] * 3)
    want = torch.tensor([[plain(*tiny, p, w) for w in WORDS] for p in PROMPTS], dtype=torch.float64)
    torch.testing.assert_close(score_NK, want, rtol=0, atol=1e-5)
    assert float(score_NK.max()) < 0
    short_NK = fm.score(PROMPTS, [ONE] * 3)
    torch.testing.assert_close(short_NK, want[:, :2], rtol=0, atol=1e-5)
    assert fm.usage.calls == 5 + 2  # what comes next is asked once for both words
    fm = LocalFM(*tiny, batch=2)
    fm.score(PROMPTS, [WORDS] * 3)
    lengths = sum(len(p.split()) + len(w.split()) for p in PROMPTS for w in WORDS)
    assert (fm.usage.calls, fm.usage.tokens_in, fm.usage.tokens_out) == (5, lengths, 12)


def test_choosing_is_scoring_single_words(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny)
    rows = [fm.tokens(p) for p in PROMPTS]
    torch.testing.assert_close(fm.choose(rows, ONE).double(), fm.score(PROMPTS, [ONE] * 3), rtol=0, atol=1e-5)
    with pytest.raises(LichenError, match="one token"):
        fm.choose(rows, ("w1 w2",))


def test_a_soft_prompt_without_offset_is_its_starting_text(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny, positions=5, start="w20 w21")
    rows = [fm.tokens(p) for p in PROMPTS]
    zero_PH = torch.zeros(5, fm.width)
    hard = fm.score([f"w20 w21 w20 w21 w20 {p}" for p in PROMPTS], [ONE] * 3)
    torch.testing.assert_close(fm.choose(rows, ONE, offset_PH=zero_PH).double(), hard, rtol=0, atol=1e-5)
    moved = fm.choose(rows, ONE, offset_PH=zero_PH + 1)
    assert float((moved - hard).abs().max()) > 1e-2
    texts = [fm.tokens(f"{p}{WORDS[2]}") for p in PROMPTS]
    labels = [[-100] * (len(t) - 2) + t[-2:] for t in texts]
    loss, count = fm.follow(texts, labels, offset_PH=zero_PH)
    want = fm.score([f"w20 w21 w20 w21 w20 {p}" for p in PROMPTS], [WORDS[2:]] * 3)
    assert int(count) == 6
    assert float(loss) == pytest.approx(-float(want.sum()), abs=1e-4)


def test_the_first_word_after_a_soft_prompt_is_predicted_from_it(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny, positions=2, start="w20 w21")
    loss, count = fm.follow([fm.tokens("w3")], [fm.tokens("w3")], offset_PH=torch.zeros(2, fm.width))
    assert int(count) == 1
    assert float(loss) == pytest.approx(-plain(*tiny, "w20 w21", " w3"), abs=1e-5)


def test_no_gradient_is_ever_computed(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    seen: list[bool] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(torch.is_grad_enabled() or not torch.is_inference_mode_enabled())
    )
    try:
        fm = LocalFM(model, tokenizer, positions=1, start="w0")
        offset_PH = torch.zeros(1, fm.width, requires_grad=True)
        scores = [
            fm.score(PROMPTS, [ONE] * 3),
            fm.choose([[5, 6]], ONE, offset_PH=offset_PH),
            fm.follow([[5, 6]], [[-100, 6]], offset_PH=offset_PH)[0],
        ]
    finally:
        hook.remove()
    assert seen == [False] * 3
    assert not any(x.requires_grad or x.is_inference() for x in scores)
    assert all(x.grad is None for x in model.parameters())


def test_a_classifier_answers_with_its_classes(tmp_path: Path) -> None:
    model, tokenizer = load_classifier(save_model(tmp_path), classes=2, seed=0)
    fm = LocalFM(model, tokenizer, classes=("calm", "glad"), positions=2, start="w9")
    score_NK = fm.score(PROMPTS, [("glad", "calm")] * 3)
    with torch.no_grad():
        alone = [model(**tokenizer(p, return_tensors="pt")).logits[0].double() for p in PROMPTS]
    torch.testing.assert_close(score_NK, torch.log_softmax(torch.stack(alone), -1)[:, [1, 0]], rtol=0, atol=1e-5)
    rows = [fm.tokens(p) for p in PROMPTS]
    hard = fm.score([f"w9 w9 {p}" for p in PROMPTS], [("calm", "glad")] * 3)
    soft = fm.choose(rows, ("calm", "glad"), offset_PH=torch.zeros(2, fm.width))
    torch.testing.assert_close(soft.double(), hard, rtol=0, atol=1e-5)
    with pytest.raises(LichenError, match="no class"):
        fm.score(PROMPTS, [("w1",)] * 3)


@pytest.mark.parametrize("ask", ["echo", "first", "chat"])
@pytest.mark.parametrize("abreast", [1, 3])
def test_an_endpoint_gives_the_local_numbers(tiny: tuple[Any, Any], ask: Any, abreast: int) -> None:
    words = WORDS if ask == "echo" else ONE
    with answering(*tiny) as (url, told):
        fm = HttpFM(Endpoint(url=url, model="tiny", ask=ask, top=46, concurrency=abreast))
        score_NK = fm.score(PROMPTS, [words] * 3)
    torch.testing.assert_close(score_NK, LocalFM(*tiny).score(PROMPTS, [words] * 3), rtol=0, atol=1e-5)
    assert fm.usage.calls == len(told.bodies) == (9 if ask == "echo" else 3)
    assert fm.usage.tokens_in > 0
    assert fm.usage.missed == 0


def test_retries_survive_a_fifth_of_the_calls_failing(tiny: tuple[Any, Any]) -> None:
    prompts = [f"w{i} w{i + 1}" for i in range(30)]
    with answering(*tiny, fail=0.2, stall=0.4) as (url, told):
        fm = HttpFM(Endpoint(url=url, model="tiny", top=46, timeout=0.3, pause=0.001, max_retries=7, concurrency=4))
        score_NK = fm.score(prompts, [ONE] * 30)
    assert told.failed > 3
    assert fm.usage.retries >= told.failed
    assert fm.usage.calls == 30
    torch.testing.assert_close(score_NK, LocalFM(*tiny).score(prompts, [ONE] * 30), rtol=0, atol=1e-5)


def test_gives_up_in_one_sentence(tiny: tuple[Any, Any]) -> None:
    waits: list[float] = []
    with answering(*tiny, fail=1.0) as (url, told):
        fm = HttpFM(Endpoint(url=url, model="tiny", max_retries=2, pause=0.5), sleep=waits.append)
        with pytest.raises(LichenError, match=r"3 tries.*500"):
            fm.score(["w1"], [ONE])
    assert len(told.bodies) == 3
    assert 0.5 <= waits[0] < 1.0 <= waits[1] < 2.0
    with answering(*tiny) as (url, told):
        with pytest.raises(LichenError, match="refuses: 404"):
            HttpFM(Endpoint(url=url, model="other")).score(["w1"], [ONE])
        with pytest.raises(LichenError, match="refuses: 302"):
            HttpFM(Endpoint(url=f"{url}/moved", model="tiny")).score(["w1"], [ONE])
        assert len(told.bodies) == 2


def test_what_is_not_listed_is_bounded_and_counted(tiny: tuple[Any, Any]) -> None:
    with answering(*tiny) as (url, _):
        fm = HttpFM(Endpoint(url=url, model="tiny", top=3))
        words = tuple(f" w{i}" for i in range(40))
        score_NK = fm.score(["w1 w2"], [words])
    true_NK = LocalFM(*tiny).score(["w1 w2"], [words])
    assert fm.usage.missed >= 37
    assert bool((score_NK >= true_NK - 1e-5).all())
    assert len(set(score_NK[0].tolist())) <= 3


def test_answers_are_kept_with_where_they_come_from(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    with answering(*tiny) as (url, told):
        endpoint = Endpoint(url=url, model="tiny", top=46, cache=tmp_path)
        first = HttpFM(endpoint).score(PROMPTS, [ONE] * 3)
        again = HttpFM(endpoint)
        torch.testing.assert_close(again.score(PROMPTS, [ONE] * 3), first, rtol=0, atol=0)
        assert (again.usage.calls, again.usage.cached, len(told.bodies)) == (0, 3, 3)
        files = sorted(tmp_path.rglob("*.json"))
        assert {json.loads(f.read_text())["from"]["endpoint"] for f in files} == {url}
        files[0].write_text("damaged")
        assert torch.equal(HttpFM(endpoint).score(PROMPTS, [ONE] * 3), first)
        assert len(told.bodies) == 4


def test_the_key_comes_from_the_environment_and_is_shown_to_nobody_else(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(*tiny) as (url, told):
        endpoint = Endpoint(url=url, model="tiny", api_key_env="LICHEN_TEST_KEY", cache=tmp_path, top=46)
        with pytest.raises(LichenError, match="LICHEN_TEST_KEY"):
            HttpFM(endpoint).score(["w1"], [ONE])
        monkeypatch.setenv("LICHEN_TEST_KEY", "s3cret")
        fm = HttpFM(endpoint)
        fm.score(["w1"], [ONE])
        assert told.keys == ["Bearer s3cret"]
        assert "s3cret" not in repr(endpoint) + repr(vars(fm))
        assert not any("s3cret" in file.read_text() for file in tmp_path.rglob("*.json"))
    with pytest.raises(LichenError, match="in the clear"):
        Endpoint(url="http://example.org/v1", model="m", api_key_env="LICHEN_TEST_KEY")
    with pytest.raises(LichenError, match="no plain http address"):
        Endpoint(url="ftp://example.org", model="m")


def test_calls_keep_to_a_rate(tiny: tuple[Any, Any]) -> None:
    waits: list[float] = []
    with answering(*tiny) as (url, _):
        fm = HttpFM(Endpoint(url=url, model="tiny", top=46, rate_limit=0.01), sleep=waits.append)
        fm.score(PROMPTS, [ONE] * 3)
    assert [round(wait, -2) for wait in waits] == [100, 200]


def batch_of(rows: list[list[list[int]]], labels: list[list[int]], active: list[bool] | None = None) -> Any:
    wide = max(len(row) for some in rows for row in some)
    return {
        "active_C": torch.tensor(active or [True] * len(rows)),
        "input_ids_CBT": torch.tensor([[row + [0] * (wide - len(row)) for row in some] for some in rows]),
        "attention_mask_CBT": torch.tensor(
            [[[1] * len(row) + [0] * (wide - len(row)) for row in some] for some in rows]
        ),
        "labels_CB": torch.tensor(labels),
        "index_CB": torch.tensor([[0] * len(some) for some in rows]),
    }


def test_prompts_as_cohort_models(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny, positions=3, start="w20")
    soft = SoftPrompt(fm, seed=1, size=7, words=ONE, after=" w30")
    rows = [[fm.tokens(p) for p in PROMPTS], [fm.tokens(p) for p in reversed(PROMPTS)]]
    batch = batch_of(rows, [[0, 1, -100], [1, 1, 0]])
    z_CD = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    loss_C, count_C = soft.loss({"mean": z_CD}, {}, batch)
    logits_CBK = soft.logits({"mean": z_CD}, {}, batch)
    assert count_C.tolist() == [2, 3]
    want = torch.nn.functional.cross_entropy(logits_CBK[1].double(), torch.tensor([1, 1, 0]), reduction="sum")
    assert float(loss_C[1]) == pytest.approx(float(want), abs=1e-5)
    alone = {name: x[1:] for name, x in batch.items()}
    assert torch.equal(soft.loss({"mean": z_CD[1:]}, {}, alone)[0], loss_C[1:])
    asleep = {**batch, "active_C": torch.tensor([False, True])}
    assert soft.loss({"mean": z_CD}, {}, asleep)[0].tolist() == [0.0, float(loss_C[1])]
    assert float(soft.offset(torch.randn(7, generator=torch.Generator().manual_seed(1)) * 3).std()) == pytest.approx(
        3, rel=0.6
    )

    words = WordPrompt(fm, candidates=("", "w20", "w21"), length=2, words=ONE, template="{prompt} {text} w30")
    texts = [[encode_bytes(p).tolist() for p in PROMPTS]]
    choice = {"choice": torch.tensor([[[0.1, 0.2, 0.7], [0.9, 0.1, 0.0]]])}
    assert words.prompt(choice["choice"][0]) == "w21"
    told, count = words.loss(choice, {}, batch_of(texts, [[0, 1, 1]]))
    score = torch.log_softmax(fm.score([f"w21 {p} w30" for p in PROMPTS], [ONE] * 3), -1)
    assert float(told[0]) == pytest.approx(-float(score[0, 0] + score[1, 1] + score[2, 1]), abs=1e-6)
    assert int(count[0]) == 3
    assert words.filled("w1", "a {prompt}") == "w1 a {prompt} w30"
    assert words.filled("", "a") == "a w30"


def test_rows_that_carry_their_own_answer(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny)
    model = WordPrompt(fm, candidates=("w20", "w21"), length=1, template="{prompt} {text}")
    row = encode_bytes("w1 w2 w3").tolist()
    labels = [-100] * 5 + row[5:]
    batch = batch_of([[row]], [[0]]) | {"labels_CBT": torch.tensor([[labels]])}
    loss_C, count_C = model.loss({"choice": torch.tensor([[[0.0, 1.0]]])}, {}, batch)
    assert float(loss_C[0]) == pytest.approx(-plain(*tiny, "w21 w1 w2", " w3"), abs=1e-5)
    assert int(count_C[0]) == 3
    assert decode_bytes(encode_bytes("é")[:1].tolist()) == ""


@pytest.mark.skipif(
    "LICHEN_ENDPOINT_PYTHON" not in os.environ, reason="no endpoint package; see benchmarks/endpoint.py"
)
def test_a_real_endpoint_ranks_words_as_the_local_model_does() -> None:
    from lichen.data.sources.fetch import fetched

    folder = fetched("smollm2-135m")
    if folder is None:
        pytest.skip("smollm2-135m is not in the cache")
    from endpoint import serving

    prompts = ["Review: I love this dress.\nSentiment:", "Review: It fell apart at once.\nSentiment:"]
    words = (" positive", " negative")
    with serving(os.environ["LICHEN_ENDPOINT_PYTHON"]) as url:
        fm = HttpFM(Endpoint(url=url, model="smollm2", top=1000))
        remote = fm.score(prompts, [words] * 2)
    local = LocalFM(*load_causal(folder)).score(prompts, [words] * 2)
    assert fm.usage.missed == 0
    assert remote.argmax(1).tolist() == local.argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(remote, local, rtol=0, atol=1.0)  # the server computes in four bits
