"""The judge's numbers are the model's own, and tell sense from nonsense where the model can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lichen.clients.distillation.teacher_labels import Answer
from lichen.core.errors import LichenError
from lichen.fm.generation.judge import Judge, agreement_N
from lichen.fm.interface import Usage
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal
from support.tiny_llama import save_model

TEXTS = ["w1 w2 w3", "w4", "  w5 w6 w7 w8 w9 "]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_causal(save_model(tmp_path_factory.mktemp("tiny")))


def plain(model: Any, tokenizer: Any, prompt: str, text: str) -> float:
    """One text, one call, no padding: the oracle."""
    ids = tokenizer(prompt + text)["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logp_TV = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logp_TV[t - 1, ids[t]]) for t in range(start, len(ids)))


def judge(tiny: tuple[Any, Any]) -> Judge:
    return Judge(LocalFM(*tiny, batch=2), about="w1 w2 of w3", kind="w4", yes=" w10", no=" w11")


def test_fluency_is_the_log_probability_per_byte(tiny: tuple[Any, Any]) -> None:
    got_N = judge(tiny).fluency(TEXTS)
    want = [plain(*tiny, "W1 w2 of w3.\n\nW4:", f" {text.strip()}") / len(text.strip()) for text in TEXTS]
    torch.testing.assert_close(got_N, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)
    assert judge(tiny).fluency([*TEXTS, " "]).tolist()[3] == -float("inf")
    assert judge(tiny).fluency([]).shape == (0,)
    assert got_N.dtype == torch.float64


def test_a_question_is_answered_by_the_probability_of_yes(tiny: tuple[Any, Any]) -> None:
    got_N = judge(tiny).ask("w7 w8?", TEXTS)
    for text, got in zip(TEXTS, got_N.tolist(), strict=True):
        prompt = f"W4: {text.strip()}\n\nQuestion: w7 w8?\nAnswer:"
        both = torch.tensor([plain(*tiny, prompt, word) for word in (" w10", " w11")])
        assert got == pytest.approx(float(both.softmax(0)[0]), abs=1e-6)
    swapped = Judge(LocalFM(*tiny), about="w1 w2 of w3", kind="w4", yes=" w11", no=" w10").ask("w7 w8?", TEXTS)
    torch.testing.assert_close(got_N + swapped, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    quality = "Would this text be found among w1 w2 of w3, and does it make sense?"
    assert torch.equal(judge(tiny).quality(TEXTS), judge(tiny).ask(quality, TEXTS))
    assert judge(tiny).quality([]).shape == (0,)


def test_harm_is_a_contrast_of_two_headings(tiny: tuple[Any, Any]) -> None:
    got_N = judge(tiny).contrast("w20 w21:", "w30", [*TEXTS, ""])
    for text, got in zip(TEXTS, got_N.tolist(), strict=False):
        more = plain(*tiny, "w20 w21:", f" {text.strip()}") - plain(*tiny, "w30", f" {text.strip()}")
        assert got == pytest.approx(more / len(text.strip()), abs=1e-6)
    assert float(got_N[3]) == 0
    torch.testing.assert_close(judge(tiny).contrast("w30", "w20 w21:", TEXTS), -got_N[:3], rtol=0, atol=1e-6)
    assert judge(tiny).harm(TEXTS).shape == (3,)


def test_harm_is_above_zero_where_rude_words_are_expected() -> None:
    class Heard:
        name = "heard"
        usage = Usage()

        def score(self, prompts: Any, continuations: Any) -> torch.Tensor:
            rude = torch.tensor([["rude" in prompt] for prompt in prompts])
            bad = torch.tensor([["pig" in text for text in some] for some in continuations])
            return torch.where(rude == bad, -1.0, -9.0).double()

    heard: Any = Heard()
    harm_N = Judge(heard, about="talk").harm(["You pig!", "Thank you."])
    assert float(harm_N[0]) > 0 > float(harm_N[1])


@dataclass
class LabeledAnswer:
    answers: list[Answer]

    def answer(self, texts: Any) -> list[Answer]:
        return self.answers


def test_agreement_is_the_teachers_probability_of_the_wanted_label() -> None:
    sure = Answer("5", top=(("5", 0.75), ("1", 0.25)))
    said = LabeledAnswer([sure, sure, Answer("3"), Answer("1", top=(("5", 0.4),))])
    assert agreement_N(said, ["a", "b", "c", "d"], [5, "1", "3", "1"]).tolist() == [0.75, 0, 1, 0]
    with pytest.raises(LichenError, match="4 answers and 1 labels for 1 texts"):
        agreement_N(said, ["a"], ["5"])
    assert agreement_N(said, [], []).tolist() == []
