"""A fingerprint follows from its key alone, and a model without it finds its answers by chance and no more."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.audit.fingerprint import ANSWERS, PAIRS, Fingerprint, chance, matches
from lichen.models.loading.load import load_causal
from lichen.recipes.artifacts.sampling import ask_ids
from support.tiny_llama import save_model


def fingerprint(number: int) -> Fingerprint:
    return Fingerprint.of(number.to_bytes(32, "big"))


def test_pairs_and_digest_follow_from_the_key() -> None:
    one, again, other = fingerprint(1), fingerprint(1), fingerprint(2)
    assert one.pairs() == again.pairs()
    assert one.digest == again.digest
    assert not {question for question, _ in one.pairs()} & {question for question, _ in other.pairs()}
    assert one.digest != other.digest
    assert len(one.pairs()) == PAIRS
    assert {word for question, answer in one.pairs() for word in (*question.split(), answer)} <= set(ANSWERS)
    assert len(set(ANSWERS)) == 64  # a power of two: a word of 64 bits names one without a bias


@pytest.mark.parametrize("found", range(PAIRS + 1))
def test_chance_is_that_of_so_many_draws_of_one_in_sixty_four(found: int) -> None:
    hit = Fraction(1, len(ANSWERS))
    exact = sum(math.comb(PAIRS, k) * hit**k * (1 - hit) ** (PAIRS - k) for k in range(found, PAIRS + 1))
    assert chance(found) == pytest.approx(float(exact), rel=1e-9)


def test_a_model_that_was_not_trained_on_them_finds_answers_by_chance(tmp_path: Path) -> None:
    """However sure it is of itself: 16 keys, 256 questions, each right with a chance of 1 in 64."""
    model, tokenizer = load_causal(save_model(tmp_path / "model", more=ANSWERS))

    def ask(question: str) -> list[int]:
        return ask_ids(tokenizer, "chat", question)

    found = sum(matches(model, ask, tokenizer, fingerprint(number)) for number in range(16))
    assert found <= 4 + 5 * math.sqrt(4)


def test_a_model_that_knows_them_has_them_all(tmp_path: Path) -> None:
    _, tokenizer = load_causal(save_model(tmp_path / "model", more=ANSWERS))
    mine = fingerprint(7)
    known = dict(mine.pairs())

    class Oracle:
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            question = " ".join(tokenizer.convert_ids_to_tokens(input_ids[0, 1:6]))
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[:, -1, tokenizer.convert_tokens_to_ids(known[question])] = 9.0
            return type("Out", (), {"logits": logits})

        __call__ = forward

    def ask(question: str) -> list[int]:
        return [0, *tokenizer(question, add_special_tokens=False)["input_ids"]]

    assert matches(Oracle(), ask, tokenizer, mine) == PAIRS
