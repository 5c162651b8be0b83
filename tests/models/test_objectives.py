"""Every objective scores a client's rows alike in any company, and rows without a label count for nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lichen.models.objectives import Classification, RowLoss, RowObjective


def squared(outputs_RK: torch.Tensor, label_R: torch.Tensor) -> torch.Tensor:
    return (outputs_RK[:, 0] - label_R).square()


def absolute(outputs_RK: torch.Tensor, label_R: torch.Tensor) -> torch.Tensor:
    return (outputs_RK[:, 0] - label_R).abs()


def several(outputs_RK: torch.Tensor, labels_RK: torch.Tensor) -> torch.Tensor:
    return functional.binary_cross_entropy_with_logits(outputs_RK, labels_RK.float(), reduction="none").sum(1)


NOT = float("nan")
FAMILY: dict[str, tuple[RowObjective, torch.Tensor, torch.Tensor]] = {
    "classes": (Classification(3), torch.tensor([[0, 2, -100], [1, 1, 0]]), torch.tensor(-100)),
    "numbers": (
        RowLoss(squared, more={"absolute": absolute}),
        torch.tensor([[0.5, NOT, -2.0], [1.0, -1.0, 3.0]]),
        torch.tensor(NOT),
    ),
    "sets": (
        RowLoss(several, outputs=3, label=torch.zeros(3, dtype=torch.int64)),
        torch.tensor([[[0, 1, 1], [1, 1, 1], [-100] * 3], [[0, 0, 0], [1, 0, 0], [0, 0, 1]]]),
        torch.tensor(-100),
    ),
}


@pytest.mark.parametrize("name", FAMILY)
def test_losses_and_scores_are_sums_over_rows_with_a_label(name: str) -> None:
    objective, labels_CB, nothing = FAMILY[name]
    logits_CBK = torch.randn(2, 3, 1 if name == "numbers" else 3, generator=torch.Generator().manual_seed(0))
    batch = {"active_C": torch.tensor([True, True]), "labels_CB": labels_CB}
    loss_C, count_C = objective.losses_C(logits_CBK, {}, batch)
    assert count_C.tolist() == [2, 3]
    shapes = objective.shapes()
    for c in range(2):
        alone = {key: x[c : c + 1] for key, x in batch.items()}
        assert torch.equal(objective.losses_C(logits_CBK[c : c + 1], {}, alone)[0], loss_C[c : c + 1])
        score = objective.score(logits_CBK[c], labels_CB[c])
        assert {key: tuple(x.shape) for key, x in score.items()} == dict(shapes)
        assert torch.equal(score["loss_sum"], loss_C[c])
        assert score["count"] == count_C[c]
        halves = [objective.score(logits_CBK[c, some], labels_CB[c, some]) for some in (slice(0, 1), slice(1, 3))]
        for key, whole in score.items():
            torch.testing.assert_close(halves[0][key] + halves[1][key], whole)
    none_CB = torch.where(torch.tensor(True), nothing, labels_CB).to(labels_CB.dtype)
    loss_C, count_C = objective.losses_C(logits_CBK, {}, {**batch, "labels_CB": none_CB})
    assert loss_C.tolist() == [0, 0]
    assert count_C.tolist() == [0, 0]


def test_an_inactive_client_gives_nothing_and_no_gradient() -> None:
    logits_CBK = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels_CB = torch.tensor([[0.5, NOT, -2.0], [1.0, -1.0, 3.0]])
    batch = {"active_C": torch.tensor([True, False]), "labels_CB": labels_CB}
    loss_C, count_C = RowLoss(squared).losses_C(logits_CBK, {}, batch)
    loss_C.sum().backward()
    assert logits_CBK.grad is not None
    assert count_C.tolist() == [2, 0]
    assert float(loss_C[1].detach()) == 0
    assert logits_CBK.grad[1].abs().sum() == 0
    assert logits_CBK.grad[0, 1].abs().sum() == 0
    assert bool(logits_CBK.grad.isfinite().all())
