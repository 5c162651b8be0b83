"""A local model writes and embeds: the fast path against one row at a time, without a cache.

Legend: B rows, V vocabulary, T tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.fm.decoding import decode, gumbel, sample_token
from lichen.fm.encoder import LocalEncoder
from lichen.fm.local import LocalFM
from lichen.fm.parsing import cut_at, matched
from lichen.fm.zero_shot import ZeroShot
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import load_causal, load_encoder
from support.tiny_llama import save_model

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w4", "w30 w31"]
SEEDS = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> tuple[Any, Any]:
    return load_causal(folder)


def slow(
    model: Any, row: list[int], seed: int, *, max_new_tokens: int, temperature: float, top_p: float, ends: Any
) -> list[int]:
    """One row, no cache, the nucleus by sorting."""
    out: list[int] = []
    while len(out) < max_new_tokens:
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([row + out])).logits[0, -1].float()
        token = int(logits_V.argmax()) if temperature == 0 else nucleus(logits_V / temperature, seed, len(out), top_p)
        if token in ends:
            break
        out.append(token)
    return out


def nucleus(scaled_V: torch.Tensor, seed: int, token: int, top_p: float) -> int:
    chance_V, order_V = scaled_V.softmax(-1).sort(descending=True, stable=True)
    inside_V = torch.cat([torch.zeros(1), chance_V.cumsum(0)[:-1]]) < top_p
    keyed_V = scaled_V + gumbel(seed, token, len(scaled_V))
    kept_V = torch.full_like(keyed_V, -torch.inf)
    kept_V[order_V[inside_V]] = keyed_V[order_V[inside_V]]
    return int(kept_V.argmax())


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.6)])
def test_many_rows_write_what_each_writes_alone(tiny: tuple[Any, Any], temperature: float, top_p: float) -> None:
    model, tokenizer = tiny
    rows = [tokenizer(p)["input_ids"] for p in PROMPTS]
    ends = (2, 11, 12, 13, 14, 15)  # many, so that rows end at different times and leave
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "top_p": top_p, "ends": ends}
    before = torch.get_rng_state()
    told, calls = decode(model, rows, seeds=SEEDS, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    want = [slow(model, row, seed, **settings) for row, seed in zip(rows, SEEDS, strict=True)]
    assert told == want
    assert len({len(ids) for ids in told}) > 1
    assert calls == max(len(ids) + (len(ids) < 12) for ids in told)


def test_greedy_is_what_transformers_writes(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    fm = LocalFM(model, tokenizer, batch=2)
    texts = fm.generate(PROMPTS, seeds=SEEDS, max_new_tokens=9, temperature=0)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        assert text == tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    assert fm.usage.tokens_in == sum(len(tokenizer(p)["input_ids"]) for p in PROMPTS)
    assert 0 < fm.usage.tokens_out <= 45


def test_a_text_depends_on_its_prompt_and_seed_alone(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny, batch=32)
    texts = fm.generate(PROMPTS, seeds=SEEDS, max_new_tokens=8)
    back = fm.generate(PROMPTS[::-1], seeds=SEEDS[::-1], max_new_tokens=8)[::-1]
    alone = [fm.generate([p], seeds=[s], max_new_tokens=8)[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert texts == back == alone
    assert texts[1] != texts[3]  # the same prompt, another seed
    assert fm.generate(["w4", "w4"], seeds=[7, 7], max_new_tokens=8, temperature=1.3)[0:1] * 2 == fm.generate(
        ["w4", "w4"], seeds=[7, 7], max_new_tokens=8, temperature=1.3
    )
    assert fm.generate([], seeds=[]) == []


def test_writing_stops_at_marks_and_at_what_was_asked_for(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny)
    (whole,) = fm.generate(["w4"], seeds=[3], max_new_tokens=20)
    words = whole.split()
    assert len(words) > 6
    mark = words[4]
    spent = fm.usage.tokens_out
    (cut,) = fm.generate(["w4"], seeds=[3], max_new_tokens=20, stop=("never", mark))
    assert cut == whole[: whole.index(mark)]
    assert fm.usage.tokens_out - spent <= 5  # no token is written beyond the mark
    (short,) = fm.generate(["w4"], seeds=[3], max_new_tokens=3)
    assert whole.startswith(short)
    assert fm.usage.tokens_out - spent <= 8


def test_a_chat_prompt_goes_through_the_template(tiny: tuple[Any, Any]) -> None:
    plain, chat = LocalFM(*tiny), LocalFM(*tiny, chat=True)
    rendered = "<user> w1 w2 </s> <assistant> "
    assert chat.generate(["w1 w2"], seeds=[5], max_new_tokens=6) == plain.generate(
        [rendered], seeds=[5], max_new_tokens=6
    )
    asked = chat.answer(["w1 w2"], (" w10", " w11"))
    torch.testing.assert_close(asked, plain.answer([rendered], ("w10", "w11")), rtol=0, atol=1e-9)
    assert plain.source + "/chat" == chat.source


def test_answers_are_probabilities_by_score(tiny: tuple[Any, Any]) -> None:
    fm = LocalFM(*tiny, batch=2)
    choices = (" w10", " w11 w12", " w13")
    chance_NK = fm.answer(PROMPTS, choices)
    raw_NK = fm.score(PROMPTS, [choices] * 5).exp()
    torch.testing.assert_close(chance_NK, raw_NK / raw_NK.sum(-1, keepdim=True), rtol=1e-9, atol=0)
    assert chance_NK.dtype == torch.float64
    assert fm.answer([], choices).shape == (0, 3)
    with pytest.raises(LichenError, match="nothing to choose"):
        fm.answer(PROMPTS, (" w1",))


def test_vectors_are_means_of_last_states(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    fm = LocalFM(model, tokenizer, batch=2)
    told_NH = fm.embed(PROMPTS)
    for prompt, row_H in zip(PROMPTS, told_NH, strict=True):
        with torch.no_grad():
            states_TH = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        want_H = states_TH.mean(0)
        torch.testing.assert_close(row_H, want_H / want_H.norm(), rtol=0, atol=1e-5)
    torch.testing.assert_close(told_NH.norm(dim=1), torch.ones(5))


def test_an_encoder_only_embeds(folder: Path) -> None:
    model, tokenizer = load_encoder(folder)
    fast, exact = LocalEncoder(model, tokenizer, batch=2), LocalEncoder(model, tokenizer, reference=True)
    told_NH = fast.embed(PROMPTS)
    torch.testing.assert_close(told_NH, exact.embed(PROMPTS), rtol=0, atol=1e-5)
    torch.testing.assert_close(told_NH, LocalFM(*load_causal(folder)).embed(PROMPTS), rtol=0, atol=1e-5)
    assert torch.equal(exact.embed(PROMPTS[:1]), exact.embed(PROMPTS)[:1])
    short = LocalEncoder(model, tokenizer, longest=2, reference=True)
    assert torch.equal(short.embed(["w1 w2 w3"]), exact.embed(["w1 w2"]))
    assert fast.embed([]).shape == (0, 32)
    assert (fast.usage.calls, fast.usage.tokens_in) == (3, 12)


def test_refuses_what_means_nothing(tiny: tuple[Any, Any], folder: Path) -> None:
    fm = LocalFM(*tiny)
    for settings in (
        {"seeds": []},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": float("nan")},
    ):
        with pytest.raises(LichenError):
            fm.generate(["w1"], **{"seeds": [1], **settings})
    with pytest.raises(LichenError, match="more than the model's 128"):
        fm.generate(["w1 " * 100], seeds=[1], max_new_tokens=64)
    with pytest.raises(LichenError, match="no tokens"):
        fm.generate([""], seeds=[1])
    classifier = LocalFM(*load_classifier(folder, classes=2, seed=0), classes=("a", "b"))
    with pytest.raises(LichenError, match="writes no text"):
        classifier.generate(["w1"], seeds=[1])
    with pytest.raises(LichenError, match="a classifier has no chat"):
        LocalFM(*load_classifier(folder, classes=2, seed=0), classes=("a", "b"), chat=True)


@given(
    st.lists(st.lists(st.floats(-6, 6, width=32), min_size=7, max_size=7), min_size=1, max_size=4),
    st.integers(0, 99),
    st.floats(0.05, 1.0),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_draw_from_the_nucleus_needs_no_sorting(
    rows: list[list[float]], seed: int, top_p: float, heat: float
) -> None:
    # Equal chances have no order to cut at, and sums of equal numbers in another order lie on either side.
    logits_BV = torch.tensor(rows) + torch.arange(7) * 0.013
    noise_BV = torch.stack([gumbel(seed, b, 7) for b in range(len(rows))])
    told = sample_token(logits_BV, noise_BV, temperature=heat, top_p=top_p).tolist()
    chance_BV = (logits_BV / heat).softmax(-1).double()
    for b, token in enumerate(told):
        likelier = float(chance_BV[b][chance_BV[b] > chance_BV[b, token]].sum())
        assert likelier < top_p + 1e-6
        near = chance_BV[b].sort(descending=True).values.cumsum(0).sub(top_p).abs().min() < 1e-5
        if not near and len(set(chance_BV[b].tolist())) == 7:
            assert token == nucleus(logits_BV[b] / heat, seed, b, top_p)


def test_draws_follow_the_probabilities() -> None:
    chance_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise_BV = torch.stack([gumbel(11, t, 4) for t in range(4000)])
    logits_BV = chance_V.log().expand(4000, -1)
    for temperature, want_V in ((1.0, chance_V), (0.5, chance_V**2 / (chance_V**2).sum())):
        counts_V = torch.bincount(sample_token(logits_BV, noise_BV, temperature=temperature), minlength=4)
        assert float(((counts_V - 4000 * want_V) ** 2 / (4000 * want_V)).sum()) < 16.3  # chi², 3 degrees, p = 0.001
    inside_V = torch.bincount(sample_token(logits_BV, noise_BV, temperature=1.0, top_p=0.7), minlength=4)
    assert inside_V[2:].tolist() == [0, 0]
    assert float(inside_V[0]) / 4000 == pytest.approx(0.625, abs=0.03)


def test_what_a_text_names() -> None:
    words = ("positive", "negative", "very negative")
    assert [matched(x, words) for x in ("Positive!", "Negative, I think", "very negative", "It is positive.")] == [
        0,
        1,
        2,
        0,
    ]
    assert [matched(x, words) for x in ("", "unpositive", "positive or negative? both: positive")] == [None, None, 0]
    assert matched("not positive, nor negative", words) is None
    assert matched("5", ("1", "5")) == 1
    assert cut_at("abc", ()) == "abc"


def test_a_real_model_writes_greedily_as_transformers_does(real: tuple[Any, Any]) -> None:
    model, tokenizer = real
    fm = LocalFM(model, tokenizer, name="smollm2-135m")
    prompts = ["The capital of France is", "Water is"]
    texts = fm.generate(prompts, seeds=[0, 0], max_new_tokens=4, temperature=0)
    ids = tokenizer(prompts[1], return_tensors="pt")
    whole = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert texts[1] == tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in texts[0]


def test_a_real_model_labels_without_examples(real: tuple[Any, Any]) -> None:
    teacher = ZeroShot(
        LocalFM(*real),
        template="Review: {text}\nSentiment:",
        words={"bad": " negative", "good": " positive"},
        free=("N/A",),
    )
    answers = teacher.answer(
        ["I love this dress.", "It fell apart at once.", "Perfect fit.", "Terrible, I sent it back."]
    )
    assert [answer.label for answer in answers] == ["good", "bad", "good", "bad"]


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    from lichen.data.sources.fetch import fetched

    folder = fetched("smollm2-135m")
    if folder is None:
        pytest.skip("smollm2-135m is not in the cache")
    return load_causal(folder)
