"""Losses of rows: each is what its row alone gives, in value and gradient, and their sum is the loss but for rounding.

Legend: C clients, B rows.
"""

from __future__ import annotations

from typing import Any

import equality
import pytest
import torch

from lichen.clients.training.soft_targets import TargetLoss
from lichen.core.errors import LichenError
from lichen.core.tree import stack
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.classifier_cohort import ClassifierCohort
from lichen.models.client_axis import row_by_row
from lichen.models.full import FullCausal, FullClassifier
from lichen.models.losses import answer_settings
from lichen.models.objectives import RowLoss
from lichen.models.students.students import ImageMLP
from lichen.models.tokens.token_targets import DistilledLM
from lichen.research.gkt.stitched import Stem, Stitched

CLIENTS, ROWS = 4, 3
WAYS = {
    "one a call": {"reference": True},
    "padded": {"reference": False, "packed": False},
    "packed": {"reference": False, "packed": True},
}


def squared(outputs_RK: torch.Tensor, label_R: torch.Tensor) -> torch.Tensor:
    return (outputs_RK[:, 0] - label_R).square()


def answers(**settings: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    prob, index = torch.rand(7, 5, generator=g).softmax(-1).sort(-1, descending=True)
    index[6] = -1
    return {"answers.prob": prob[:, :2], "answers.index": index[:, :2], **answer_settings(**settings)}


def causal(way: str, heads: tuple[str, ...] = (), dtype: Any = torch.float64, **more: Any) -> Any:
    spec = Lora(targets=("q_proj", "v_proj"), rank=4, heads=heads)
    return CausalCohort(equality.tiny("llama", dtype=dtype), adapter=spec, name="llama", **WAYS[way], **more)


def classifier(way: str, dtype: Any = torch.float64) -> Any:
    spec = equality.spec_of("bert")
    return ClassifierCohort(equality.tiny("bert", dtype=dtype), adapter=spec, name="bert", **WAYS[way])


def mlp(reference: bool = True, **more: Any) -> Any:
    return ImageMLP(6, hidden=(8,), classes=more.pop("classes", 5), reference=reference, **more)


MODELS: dict[str, Any] = {
    **{f"causal, {way}": lambda dtype, way=way: causal(way, dtype=dtype) for way in WAYS},
    **{f"causal, {way}, own head": lambda dtype, way=way: causal(way, ("lm_head",), dtype) for way in WAYS},
    **{f"causal, {way}, chunks": lambda dtype, way=way: causal(way, ("lm_head",), dtype, chunk=5) for way in WAYS},
    **{f"classifier, {way}": lambda dtype, way=way: classifier(way, dtype) for way in WAYS},
    "whole causal": lambda dtype: FullCausal(equality.tiny("llama", dtype=dtype), name="whole"),
    "whole classifier": lambda dtype: FullClassifier(equality.tiny("bert", dtype=dtype), name="whole"),
    "student": lambda dtype: mlp(),
    "students at once": lambda dtype: mlp(reference=False),
    "regression": lambda dtype: mlp(classes=1, objective=RowLoss(squared)),
    "stitched": lambda dtype: Stitched(Stem(6, widths=(8,), classes=5), mlp_top()),
}


def mlp_top() -> Any:
    return ImageMLP(8, hidden=(4,), classes=5, name="top")


def batch_of(name: str, dtype: Any) -> Any:
    """Rows of several lengths; a client that sits out, a row without label, a padding row."""
    g = torch.Generator().manual_seed(1)
    if "causal" in name or "classifier" in name:
        batch = dict(equality.batch_of("llama" if "causal" in name else "bert", clients=CLIENTS, rows=ROWS))
    else:
        x_CBF = torch.randn(CLIENTS, ROWS, 6, generator=g).to(dtype)
        batch = {"x_CBF": x_CBF, "labels_CB": torch.randint(5, (CLIENTS, ROWS), generator=g)}
    if name == "regression":
        batch["labels_CB"] = torch.randn(CLIENTS, ROWS, generator=g).to(dtype)
    batch["active_C"] = torch.tensor([True, True, False, True])
    nothing = float("nan") if name == "regression" else -100
    label = "labels_CBT" if "causal" in name else "labels_CB"
    batch[label] = batch[label].clone()
    batch[label][1, 0], batch[label][3] = nothing, nothing
    batch["index_CB"] = torch.arange(ROWS).repeat(CLIENTS, 1)
    batch["index_CB"][1, 0] = -1
    return batch


def start_of(model: Any, dtype: Any) -> Any:
    trees = equality.start_of(model, CLIENTS)
    return {n: x.to(dtype).requires_grad_() for n, x in stack(trees).items()}


def gradients(loss: torch.Tensor, start_C: Any) -> list[torch.Tensor]:
    return list(
        torch.autograd.grad(loss, list(start_C.values()), allow_unused=True, materialize_grads=True, retain_graph=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_rows_loss_and_gradient_are_those_of_the_row_alone(name: str) -> None:
    model, dtype = MODELS[name](torch.float64), torch.float64
    batch, start_C = batch_of(name, dtype), start_of(model, dtype)
    loss_CB, count_CB = model.losses(start_C, {}, batch)
    alone_CB, found_CB = row_by_row(model.loss, start_C, {}, batch)
    assert loss_CB.shape == count_CB.shape == (CLIENTS, ROWS)
    assert torch.equal(count_CB, found_CB)
    torch.testing.assert_close(loss_CB, alone_CB, rtol=1e-10, atol=1e-12)
    assert not loss_CB[2].any()
    assert not loss_CB[3].any()
    assert not loss_CB[1, 0].any()
    assert int((count_CB > 0).sum()) == 2 * ROWS - 1
    for b in range(ROWS):
        one = {n: x if n == "active_C" else x[:, b : b + 1] for n, x in batch.items()}
        mine, other = gradients(loss_CB[:, b].sum(), start_C), gradients(model.loss(start_C, {}, one)[0].sum(), start_C)
        assert max(float(g.abs().max()) for g in mine) > 1e-4
        for a, z in zip(mine, other, strict=True):
            torch.testing.assert_close(a, z, rtol=1e-8, atol=1e-11)
            assert not a[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_rows_add_up_to_the_loss_within_what_rounding_can_do(name: str, dtype: Any) -> None:
    """Each sum of n terms above 0 is off by (n - 1) u at most, so two of them lie within 2 n u."""
    model = MODELS[name](dtype)
    batch, start_C = batch_of(name, dtype), start_of(model, dtype)
    with torch.no_grad():
        loss_C, count_C = model.loss(start_C, {}, batch)
        loss_CB, count_CB = model.losses(start_C, {}, batch)
    assert torch.equal(count_CB.sum(1), count_C)
    assert loss_CB.dtype == loss_C.dtype
    bound_C = 2 * count_C * torch.finfo(loss_C.dtype).eps / 2 * loss_C
    assert bool(((loss_CB.sum(1) - loss_C).abs() <= bound_C).all())
    assert bool((loss_C[:2] > 0).all())


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 2.0, "weight": 0.5}, {"threshold": 0.25}, {"hard": True, "threshold": 0.25}]
)
@pytest.mark.parametrize("reference", [True, False])
def test_rows_with_a_teachers_answer_add_it(settings: Any, reference: bool) -> None:
    model, fixed = mlp(reference), answers(**settings)
    batch, start_C = batch_of("student", torch.float64), start_of(model, torch.float64)
    batch["answer_CB"] = torch.tensor([[0, -1, 1], [2, 6, 3], [4, 4, 4], [-1, 5, -1]])
    loss_CB, count_CB = model.losses(start_C, fixed, batch)
    alone_CB, found_CB = row_by_row(model.loss, start_C, fixed, batch)
    loss_C, count_C = model.loss(start_C, fixed, batch)
    assert torch.equal(count_CB, found_CB)
    assert torch.equal(count_CB.sum(1), count_C)
    torch.testing.assert_close(loss_CB, alone_CB, rtol=1e-6, atol=1e-9)  # the answers are float32
    torch.testing.assert_close(loss_CB.sum(1), loss_C, rtol=1e-6, atol=1e-9)
    assert not loss_CB[2].any()
    plain_CB, _ = model.losses(start_C, {}, {n: x for n, x in batch.items() if n != "answer_CB"})
    assert bool((loss_CB > plain_CB).any())


def test_a_language_model_that_hears_a_teacher_answers_row_by_row() -> None:
    model = DistilledLM(causal("one a call"), lm=0.5)
    batch, start_C = batch_of("causal", torch.float64), start_of(model, torch.float64)
    fixed = {
        "answers.index": torch.randint(5, (20, 2), generator=torch.Generator().manual_seed(0)),
        "answers.prob": torch.full((20, 2), 0.5),
        "answers.at": torch.tensor([0, int((batch["labels_CBT"][0, 0, 1:] != -100).sum())]),
    }
    batch["answer_CB"] = torch.full((CLIENTS, ROWS), -1)
    batch["answer_CB"][0, 0] = 0
    loss_CB, count_CB = model.losses(start_C, fixed, batch)
    loss_C, count_C = model.loss(start_C, fixed, batch)
    torch.testing.assert_close(loss_CB.sum(1), loss_C, rtol=1e-10, atol=0)
    assert torch.equal(count_CB.sum(1), count_C)


def test_soft_targets_are_no_sum_over_rows_and_say_so() -> None:
    model = TargetLoss(mlp())
    batch, start_C = batch_of("student", torch.float32), start_of(model, torch.float32)
    loss_CB, _ = model.losses(start_C, {}, batch)
    assert torch.equal(loss_CB, model.inner.losses(start_C, {}, batch)[0])
    with pytest.raises(LichenError, match="no sum over rows"):
        model.losses(start_C, {}, {**batch, "target_CBK": torch.zeros(CLIENTS, ROWS, 5)})


def test_a_client_alone_has_the_bits_it_has_beside_others() -> None:
    for name in ("causal, one a call", "classifier, one a call", "whole causal", "student", "regression"):
        model = MODELS[name](torch.float32)
        batch, start_C = batch_of(name, torch.float32), start_of(model, torch.float32)
        loss_CB, _ = model.losses(start_C, {}, batch)
        for c in range(CLIENTS):
            alone, _ = model.losses(
                {n: x[c : c + 1] for n, x in start_C.items()}, {}, {n: x[c : c + 1] for n, x in batch.items()}
            )
            assert torch.equal(alone[0], loss_CB[c])


def test_labels_out_of_range_are_refused_as_in_training() -> None:
    batch, model = batch_of("student", torch.float32), mlp()
    batch["labels_CB"][0, 0] = 5
    with pytest.raises(LichenError, match="outside"):
        model.losses(start_of(model, torch.float32), {}, batch)
    with pytest.raises(LichenError, match="class answers"):
        causal("packed").losses({}, answers(), batch_of("causal", torch.float64))
