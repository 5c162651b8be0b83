"""Losses: chunks, soft answers by hand, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.models.losses import classify_losses_C, soft_loss
from lichen.models.students.students import ImageMLP
from lichen.models.tokens.token_losses import token_loss


def test_chunks_give_the_whole_loss_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    label = torch.randint(11, (23,), generator=generator)
    hidden = torch.randn(23, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    results = []
    for chunk in (100, 23, 5, 1):
        loss = token_loss(lambda h: h @ weight.t(), hidden, label, chunk=chunk)
        results.append((loss.detach(), torch.autograd.grad(loss, hidden)[0]))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-12, atol=1e-14)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6), kept=st.integers(1, 6))
def test_soft_loss_by_hand(seed: int, classes: int, kept: int) -> None:
    kept = min(kept, classes)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, generator=generator, dtype=torch.float64)
    full = torch.rand(4, classes, generator=generator, dtype=torch.float64).softmax(-1)
    prob, index = full.topk(kept)
    answer = torch.tensor([2, -1, 0])
    loss, count = soft_loss(logits, answer, prob, index.to(torch.int16))
    expected = 0.0
    for row, a in ((0, 2), (2, 0)):
        log = logits[row].log_softmax(-1)
        chosen = index[a].tolist()
        for j, k in enumerate(chosen):
            expected -= float(prob[a, j] * log[k])
        for k in set(range(classes)) - set(chosen):
            expected -= (1 - float(prob[a].sum())) / (classes - kept) * float(log[k])
    assert int(count) == 2
    assert math.isclose(float(loss), expected, rel_tol=1e-10)


def test_labels_and_answers_add_up() -> None:
    model = ImageMLP(4, hidden=(3,), classes=3)
    params_C = {name: x[None] for name, x in model.init(0).items()}
    fixed = {
        "answers.prob": torch.tensor([[0.75], [1.0]], dtype=torch.float16),
        "answers.index": torch.tensor([[2], [1]], dtype=torch.int8),
    }
    batch = {
        "active_C": torch.tensor([True]),
        "x_CBF": torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0)),
        "labels_CB": torch.tensor([[1, -100, -100]]),
        "answer_CB": torch.tensor([[-1, 0, -1]]),
    }
    log = model.logits(params_C, fixed, batch)[0].log_softmax(-1)
    loss_C, count_C = model.loss(params_C, fixed, batch)
    expected = -log[0, 1] - (0.75 * log[1, 2] + 0.125 * log[1, 0] + 0.125 * log[1, 1])
    assert count_C.tolist() == [2]
    torch.testing.assert_close(loss_C[0], expected)
    with pytest.raises(LichenError, match="none came down"):
        model.loss(params_C, {}, batch)


def test_labels_outside_the_classes_are_refused() -> None:
    batch = {"active_C": torch.tensor([True]), "labels_CB": torch.tensor([[3]])}
    with pytest.raises(LichenError, match=r"outside 0\.\.2"):
        classify_losses_C(torch.zeros(1, 1, 3), {}, batch)
