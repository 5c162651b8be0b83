"""A client of a cohort against the slow oracle: PEFT's own model and torch's own optimizer, one client alone."""

from __future__ import annotations

import equality
import pytest
import torch


@pytest.mark.parametrize("architecture", equality.ARCHITECTURES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_training_equals_peft_and_company_does_not_matter(
    architecture: str, optimizer: str, dtype: torch.dtype
) -> None:
    gaps = equality.compare(architecture, dtype=dtype, optimizer=optimizer, steps=2)
    assert gaps["8 vs alone"] == 0
    assert gaps["3 vs alone"] == 0
    assert gaps["of the rounding allowed"] <= 1


@pytest.mark.parametrize("architecture", equality.ARCHITECTURES)
def test_the_comparison_sees_a_wrong_scale(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = equality.spec_of(architecture)
    wrong = equality.Lora(targets=right.targets, rank=right.rank, alpha=right.alpha * 1.01, heads=right.heads)
    model = equality.tiny(architecture)
    cohort = equality.cohort_of(architecture, model)
    start = equality.start_of(cohort, 1)[0]
    batch = equality.batch_of(architecture, clients=1)
    alone = {name: x[0] for name, x in batch.items()}
    trained, _ = equality.train_cohort(cohort, {k: x[None] for k, x in start.items()}, [batch], "sgd")
    monkeypatch.setattr(equality, "spec_of", lambda _: wrong)
    other, _, slack = equality.train_peft(architecture, model, start, [alone], "sgd")
    assert max(float(((trained[k][0] - x).abs() / slack[k]).max()) for k, x in other.items()) > 10
    assert equality.largest({k: x[0] for k, x in trained.items()}, other) > 1e-4
    assert equality.largest({k: x[0] for k, x in trained.items()}, start) > 1e-3
