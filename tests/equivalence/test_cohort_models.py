"""Eight together, three together and alone: the same bits of every client's loss and gradients.

Legend: C clients, B rows, T tokens.
"""

from __future__ import annotations

from typing import Any

import equality
import pytest
import torch
from torch import Tensor

from lichen.core.tree import Tree, stack
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer

STUDENTS = {
    "text-cnn": lambda: TextCNN(97, width=12, classes=5),
    "transformer": lambda: TwoLayerTransformer(97, width=16, heads=4, classes=5, max_length=32),
    "image-mlp": lambda: ImageMLP(49, hidden=(17, 9), classes=5),
    "image-cnn": lambda: ImageCNN(7, width=3, classes=5),
}


def _model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name in STUDENTS:
        return STUDENTS[name]()
    return equality.cohort_of(name, equality.tiny(name, dtype=dtype))


def _batch(name: str, rows: int, width: int) -> dict[str, Tensor]:
    if not name.startswith("image"):
        return equality.batch_of("bert" if name in STUDENTS else name, rows=rows, width=width)
    generator = torch.Generator().manual_seed(rows)
    return {
        "active_C": torch.ones(8, dtype=torch.bool),
        "x_CBF": torch.rand(8, rows, 7, 7, generator=generator),
        "labels_CB": torch.randint(5, (8, rows), generator=generator),
    }


def _run(model: Any, starts: list[Tree], batch: dict[str, Tensor], first: int, last: int) -> tuple[Tensor, ...]:
    params_C = {name: x.requires_grad_() for name, x in stack(starts[first:last]).items()}
    part = {name: x[first:last] for name, x in batch.items()}
    loss_C, count_C = model.loss(params_C, {}, part)
    return (loss_C.detach(), count_C, *torch.autograd.grad(loss_C.sum(), list(params_C.values())))


@pytest.mark.parametrize("name", [*equality.ARCHITECTURES, *STUDENTS])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 11), (4, 16)])
def test_bits_do_not_depend_on_company(name: str, rows: int, width: int) -> None:
    model, batch = _model(name), _batch(name, rows, width)
    starts = equality.start_of(model, 8)
    eight, three = _run(model, starts, batch, 0, 8), _run(model, starts, batch, 0, 3)
    for c in range(8):
        alone = _run(model, starts, batch, c, c + 1)
        for i, one in enumerate(alone):
            assert eight[i][c : c + 1].numpy().tobytes() == one.numpy().tobytes()
            if c < 3:
                assert three[i][c : c + 1].numpy().tobytes() == one.numpy().tobytes()
    assert all(float(x.abs().max()) > 0 for x in eight[2:])


@pytest.mark.parametrize("name", [*equality.ARCHITECTURES, *STUDENTS])
def test_stacked_is_close_to_reference(name: str) -> None:
    model, batch = _model(name), _batch(name, 3, 11)
    starts = equality.start_of(model, 8)
    exact = _run(model, starts, batch, 0, 8)
    model.reference = False
    for fast, slow in zip(_run(model, starts, batch, 0, 8), exact, strict=True):
        assert float((fast - slow).abs().max()) <= 1e-5 * max(float(slow.abs().max()), 1e-3)


@pytest.mark.parametrize("name", [*equality.ARCHITECTURES, *STUDENTS])
@pytest.mark.parametrize("reference", [True, False])
def test_what_padding_rows_hold_changes_nothing(name: str, reference: bool) -> None:
    if name == "t5-encoder":
        pytest.skip("its stand-in loss takes every row")
    model, batch = _model(name), _batch(name, 3, 11)
    model.reference = reference
    starts = equality.start_of(model, 8)
    results = []
    for token in (4, 7):
        padded = {key: x.clone() for key, x in batch.items()}
        for key, value in (("labels_CB", -100), ("labels_CBT", -100), ("input_ids_CBT", token), ("x_CBF", token)):
            if key in padded:
                padded[key][:, -1] = value
        results.append(_run(model, starts, padded, 0, 8))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    per_client = 2 if "labels_CB" in batch else None
    assert per_client is None or results[0][1].tolist() == [per_client] * 8


@pytest.mark.parametrize("name", ["llama", "bert", "text-cnn", "image-mlp"])
def test_more_padding_rows_and_columns_change_only_rounding(name: str) -> None:
    model, batch = _model(name), _batch(name, 3, 11)
    starts = equality.start_of(model, 8)
    wide = {}
    for key, x in batch.items():
        fill = -100 if key.startswith("labels") else 0
        rows = torch.full((8, 1, *x.shape[2:]), fill, dtype=x.dtype) if x.dim() > 1 else None
        y = x if rows is None else torch.cat([x, rows], dim=1)
        if key in ("input_ids_CBT", "attention_mask_CBT", "labels_CBT"):
            y = torch.nn.functional.pad(y, (0, 5), value=fill)
        wide[key] = y
    if "attention_mask_CBT" in wide:
        wide["attention_mask_CBT"][:, -1, 0] = 1
    a, b = _run(model, starts, batch, 0, 8), _run(model, starts, wide, 0, 8)
    assert torch.equal(a[1], b[1])
    for x, y in zip(a, b, strict=True):
        assert float((x - y).abs().max()) <= 1e-5 * max(float(x.abs().max()), 1e-3)


@pytest.mark.parametrize("name", [*(a for a in equality.ARCHITECTURES if a != "t5-encoder"), *STUDENTS])
@pytest.mark.parametrize("reference", [True, False])
def test_inactive_clients_give_nothing(name: str, reference: bool) -> None:
    model, batch = _model(name), _batch(name, 3, 11)
    model.reference = reference
    starts = equality.start_of(model, 8)
    batch["active_C"] = torch.tensor([True, False] * 4)
    loss_C, count_C, *grads = _run(model, starts, batch, 0, 8)
    assert loss_C[1::2].tolist() == [0.0] * 4
    assert count_C[1::2].tolist() == [0] * 4
    assert bool((loss_C[0::2] > 0).all())
    assert all(float(x[1::2].abs().max()) == 0 and bool(x.isfinite().all()) for x in grads)
