"""Labels without examples, and how far to believe them.

Legend: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fm_cache import Counting
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.calibration import at_temperature, calibration_error, divided, fit_temperature
from lichen.fm.zero_shot import ZeroShot

WORDS = {"bad": " poor", "good": " great"}


class Biased(Counting):
    """Sees the signal ``+`` or ``-`` in a text, and likes the second word eight times as much as it should."""

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        self._note(prompts)
        odds = [8.0 * 4.0 ** (p.count("+") - p.count("-")) for p in prompts]
        return torch.tensor([[1 / (1 + x), x / (1 + x)] for x in odds], dtype=torch.float64)


def teacher(**more: Any) -> ZeroShot:
    return ZeroShot(Biased(), **{"template": "Say: {text} {kept}:", "words": WORDS, **more})


TEXTS = ["+", "-", "{text}-", "++", "--", "+"]
TRUE = ["good", "bad", "bad", "good", "bad", "good"]


def test_calibration_takes_the_preference_out() -> None:
    assert {answer.label for answer in teacher(calibrate="none").answer(["+", "-"])} == {"good"}
    for calibrated in (teacher(), teacher(calibrate="batch").over(TEXTS), teacher(calibrate="batch")):
        assert [answer.label for answer in calibrated.answer(TEXTS)] == TRUE
    context = teacher().chances(["+", "", "--"])
    want = torch.tensor([[1 / 5, 4 / 5], [1 / 2, 1 / 2], [16 / 17, 1 / 17]], dtype=torch.float64)
    # Dividing by the prior leaves its odds: 8 to 1 in, 1 to 1 out.
    torch.testing.assert_close(context, want, rtol=1e-9, atol=0)


def test_an_answer_tells_every_class_likeliest_first() -> None:
    (answer,) = teacher().answer(["++"])
    assert answer.label == answer.top[0][0] == "good"
    assert [name for name, _ in answer.top] == ["good", "bad"]
    assert sum(p for _, p in answer.top) == pytest.approx(1)
    assert answer.top[0][1] == pytest.approx(16 / 17)
    assert teacher().answer([]) == []


def test_the_template_is_filled_once_and_a_fixed_prior_is_not_asked_again() -> None:
    asked = teacher()
    asked.answer(["{text}"])
    assert asked.fm.asked[0] == ["Say: {text} {kept}:"]  # type: ignore[attr-defined]
    fixed = asked.over(())
    before = fixed.fm.usage.calls
    fixed.answer(["+"])
    assert fixed.fm.usage.calls == before + 1
    assert fixed.prior == pytest.approx((1 / 9, 8 / 9))


def test_batch_answers_depend_on_the_texts_they_are_asked_with_unless_fixed() -> None:
    loose, fixed = teacher(calibrate="batch"), teacher(calibrate="batch").over(TEXTS)
    assert not torch.allclose(loose.chances(["+", "+"])[:1], loose.chances(["+", "-"])[:1])
    assert torch.equal(fixed.chances(["+", "+"])[:1], fixed.chances(["+", "-"])[:1])


def test_a_fitted_temperature_lowers_the_error_and_changes_no_label() -> None:
    texts = ["+"] * 10 + ["-"] * 10
    labels = ["good"] * 6 + ["bad"] * 4 + ["bad"] * 6 + ["good"] * 4  # right in 60 %, sure to 80 %
    plain = teacher()
    fitted = plain.fitted(texts, labels)
    label_N = torch.tensor([plain.classes.index(x) for x in labels])
    assert [a.label for a in fitted.answer(texts)] == [a.label for a in plain.answer(texts)]
    assert calibration_error(plain.chances(texts), label_N) == pytest.approx(0.2)
    assert calibration_error(fitted.chances(texts), label_N) == pytest.approx(0, abs=1e-6)
    assert fitted.temperature > 1
    with pytest.raises(LichenError, match="no class 'odd'"):
        plain.fitted(["+"], ["odd"])


@given(st.integers(2, 5), st.integers(0, 99), st.floats(0.3, 3))
def test_the_temperature_is_the_best_of_a_fine_grid(classes: int, seed: int, heat: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    chance_NK = torch.randn(60, classes, generator=generator, dtype=torch.float64).softmax(-1)
    label_N = torch.multinomial(at_temperature(chance_NK, heat), 1, generator=generator)[:, 0]

    def loss(temperature: float) -> float:
        return -float(at_temperature(chance_NK, temperature).gather(1, label_N[:, None]).log().mean())

    found = fit_temperature(chance_NK, label_N)
    assert loss(found) <= min(loss(10 ** (x / 20)) for x in range(-40, 41)) + 1e-9


def test_the_error_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    chance_NK = (2 * torch.randn(200, 4, generator=generator)).softmax(-1).double()
    label_N = torch.randint(4, (200,), generator=generator)
    want = 0.0
    for b in range(15):
        rows = [n for n in range(200) if b / 15 < float(chance_NK[n].max()) <= (b + 1) / 15]
        if rows:
            right = sum(int(chance_NK[n].argmax()) == int(label_N[n]) for n in rows) / len(rows)
            want += len(rows) / 200 * abs(right - sum(float(chance_NK[n].max()) for n in rows) / len(rows))
    assert calibration_error(chance_NK, label_N) == pytest.approx(want, abs=1e-12)


def test_a_chance_of_zero_stays_finite() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    for told in (divided(sure, torch.tensor([1.0, 0.0])), at_temperature(sure, 2.0)):
        assert bool(told.isfinite().all())
        torch.testing.assert_close(told.sum(-1), torch.ones(2, dtype=torch.float64))
    assert 0 < fit_temperature(sure, torch.tensor([1, 0])) <= 100


def test_refuses_what_cannot_be_asked() -> None:
    for more, match in (
        ({"template": "no place"}, "lacks a place"),
        ({"words": {"a": " x", "b": " x"}}, "share a word"),
        ({"words": {"a": " x"}}, "share a word"),
        ({"calibrate": "guess"}, "no way"),
        ({"free": ()}, "without content"),
    ):
        with pytest.raises(LichenError, match=match):
            teacher(**more)
    with pytest.raises(LichenError, match="nothing to calibrate"):
        teacher(calibrate="none").over(TEXTS)
    with pytest.raises(LichenError, match="labels"):
        calibration_error(torch.ones(2, 2), torch.tensor([0]))
    with pytest.raises(LichenError, match="no class"):
        fit_temperature(torch.ones(1, 2), torch.tensor([2]))
    with pytest.raises(LichenError, match="temperature"):
        at_temperature(torch.ones(1, 2), 0)
