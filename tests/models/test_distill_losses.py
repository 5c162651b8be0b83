"""Temperature, weight, threshold and hard answers against formulas written out, and what must not change.

Legend: C clients, B rows, K classes, N answers, k kept.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.models.losses import answer_settings, classify_losses_C, distill_loss, soft_loss


def _case(seed: int, classes: int, kept: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """``(logits_BK, answer_B, fixed, teacher_NK)`` in float64."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, classes, generator=generator, dtype=torch.float64) * 2
    prob, index = teacher.softmax(-1).topk(kept)
    logits = torch.randn(5, classes, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([3, -1, 0, 5, 0]), {"answers.prob": prob, "answers.index": index}, teacher


@given(seed=st.integers(0, 999), classes=st.integers(2, 6), temperature=st.floats(0.5, 8.0))
def test_full_answers_with_a_temperature_are_hintons_loss(seed: int, classes: int, temperature: float) -> None:
    logits, answer, fixed, teacher = _case(seed, classes, classes)
    fixed |= answer_settings(temperature=temperature)
    warm = float(fixed["answers.temperature"])
    student = logits.clone().requires_grad_()
    loss, count = distill_loss(student, answer, fixed)
    rows = answer[answer >= 0]
    divergence = torch.nn.functional.kl_div(
        (student[answer >= 0] / warm).log_softmax(-1),
        (teacher[rows] / warm).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
    wanted = torch.autograd.grad(warm**2 * divergence, student, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, student, retain_graph=True)[0], wanted, rtol=1e-9, atol=1e-11)
    soft = (teacher[rows] / warm).softmax(-1)
    entropy = -(soft * soft.log()).sum()
    torch.testing.assert_close(loss, warm**2 * (divergence + entropy), rtol=1e-9, atol=1e-9)
    assert int(count) == 4


def test_the_gradient_keeps_its_size_when_both_sides_are_hot() -> None:
    logits, answer, fixed, teacher = _case(1, 4, 4)
    sizes = []
    for temperature in (50.0, 100.0):
        student = logits.clone().requires_grad_()
        loss, _ = distill_loss(student, answer, fixed | answer_settings(temperature=temperature))
        sizes.append(float(torch.autograd.grad(loss, student)[0].norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    # In the limit it is the difference of the centred logits over K.
    rows, chosen = answer[answer >= 0], answer >= 0
    limit = ((logits[chosen] - logits[chosen].mean(1, True)) - (teacher[rows] - teacher[rows].mean(1, True))) / 4
    assert sizes[1] == pytest.approx(float(limit.norm()), rel=0.05)


@given(seed=st.integers(0, 999), classes=st.integers(2, 6), kept=st.integers(1, 6))
def test_settings_that_say_nothing_change_rounding_at_most(seed: int, classes: int, kept: int) -> None:
    logits, answer, fixed, _ = _case(seed, classes, min(kept, classes))
    plain = soft_loss(logits, answer, fixed["answers.prob"], fixed["answers.index"])
    bare = distill_loss(logits, answer, fixed)
    assert torch.equal(plain[0], bare[0])
    assert torch.equal(plain[1], bare[1])
    idle = answer_settings(temperature=1.0, weight=1.0, threshold=0.0, hard=False)
    loss, count = distill_loss(logits, answer, fixed | idle)
    torch.testing.assert_close(loss, plain[0], rtol=1e-10, atol=1e-12)
    assert int(count) == int(plain[1])


def test_weight_threshold_and_hard_answers_by_hand() -> None:
    logits, answer, fixed, teacher = _case(7, 3, 2)
    log = logits.log_softmax(-1)
    top, label = teacher.softmax(-1).max(1)
    cut = float(top[answer[answer >= 0]].unique()[1]) - 1e-6  # the least sure answer alone falls out
    loss, count = distill_loss(logits, answer, fixed | answer_settings(threshold=cut, hard=True, weight=0.25))
    rows = [b for b in range(5) if answer[b] >= 0 and float(top[answer[b]]) >= cut]
    assert len(rows) in (2, 3)
    expected = -0.25 * sum(top[answer[b]] * log[b, label[answer[b]]] for b in rows)
    torch.testing.assert_close(loss, torch.as_tensor(expected), rtol=1e-9, atol=1e-12)
    assert int(count) == len(rows)
    heavy, _ = distill_loss(logits, answer, fixed | answer_settings(weight=3.0))
    torch.testing.assert_close(heavy, 3 * distill_loss(logits, answer, fixed)[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 2.0}])
def test_answers_that_name_no_class_are_none(settings: dict[str, float]) -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fixed = {
        "answers.prob": torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.5, 0.25]]),
        "answers.index": torch.tensor([[2, -1], [-1, -1], [1, 0]], dtype=torch.int8),
    }
    loss, count = distill_loss(logits, torch.tensor([0, 1, 2]), fixed | answer_settings(**settings))
    warm = settings.get("temperature", 1.0)
    target = torch.tensor([[0.5 / 3, 0.5 / 3, 0.5, 0.5 / 3], [0.25, 0.5, 0.125, 0.125]], dtype=torch.float64)
    target = (target.log() / warm).softmax(-1)
    expected = -(warm**2) * (target * (logits[[0, 2]] / warm).log_softmax(-1)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert int(count) == 2


def test_a_clients_loss_has_the_same_bits_in_any_company() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, 3, generator=generator)
    prob, index = torch.randn(9, 3, generator=generator).softmax(-1).topk(2)
    settings = answer_settings(temperature=3.0, weight=0.4, threshold=0.3)
    fixed = {"answers.prob": prob.half(), "answers.index": index, **settings}
    batch = {
        "active_C": torch.tensor([True, True, False, True, True]),
        "labels_CB": torch.randint(-1, 3, (5, 7), generator=generator) * 1,
        "answer_CB": torch.randint(-1, 9, (5, 7), generator=generator),
    }
    batch["labels_CB"][batch["labels_CB"] < 0] = -100
    together = classify_losses_C(logits, fixed, batch)
    for c in range(5):
        alone = classify_losses_C(logits[c : c + 1], fixed, {name: x[c : c + 1] for name, x in batch.items()})
        assert together[0][c].numpy().tobytes() == alone[0][0].numpy().tobytes()
        assert int(together[1][c]) == int(alone[1][0])
    assert float(together[0][2]) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.0), ("temperature", float("inf")), ("weight", -1.0), ("threshold", 1.5)]
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(LichenError, match=f"answers.{name}"):
        answer_settings(**{name: value})
