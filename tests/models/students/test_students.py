"""Students learn, take what the contract says, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.tree import broadcast
from lichen.models.students.students import ImageCNN, ImageMLP, TextCNN, TwoLayerTransformer


def _texts() -> dict[str, Tensor]:
    """Class = which of three signal tokens a row holds."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40, (2, 24, 8), generator=generator)
    labels = torch.randint(3, (2, 24), generator=generator)
    ids[..., 3] = labels + 1
    return {"input_ids_CBT": ids, "attention_mask_CBT": torch.ones_like(ids), "labels_CB": labels}


def _images() -> dict[str, Tensor]:
    """Class = which third of the image is bright."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 * torch.rand(2, 24, 9, 9, generator=generator)
    labels = torch.randint(3, (2, 24), generator=generator)
    for c in range(2):
        for b in range(24):
            k = 3 * int(labels[c, b])
            x[c, b, k : k + 3] += 0.7
    return {"x_CBF": x, "labels_CB": labels}


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: TextCNN(40, width=8, classes=3), _texts),
        (lambda: TwoLayerTransformer(40, width=16, heads=2, classes=3), _texts),
        (lambda: ImageMLP(81, hidden=(16,), classes=3), _images),
        (lambda: ImageCNN(9, width=4, classes=3), _images),
    ],
)
def test_a_student_learns(make: Callable[[], Any], data: Callable[[], dict[str, Tensor]]) -> None:
    model, batch = make(), {"active_C": torch.ones(2, dtype=torch.bool), **data()}
    params_C = {name: x.requires_grad_() for name, x in broadcast(model.init(0), 2).items()}
    optimizer = torch.optim.Adam(params_C.values(), lr=0.02)
    for _ in range(60):
        loss_C, count_C = model.loss(params_C, {}, batch)
        optimizer.zero_grad()
        (loss_C / count_C).sum().backward()
        optimizer.step()
    with torch.no_grad():
        logits_CBK = model.logits(params_C, {}, batch)
    assert logits_CBK.shape == (2, 24, 3)
    accuracy_C = (logits_CBK.argmax(-1) == batch["labels_CB"]).double().mean(1)
    assert bool((accuracy_C > 0.9).all())


def test_flat_and_square_images_are_one_thing() -> None:
    model = ImageCNN(8, channels=2, width=3, classes=4)
    params_C = broadcast(model.init(0), 2)
    x = torch.rand(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    active = torch.ones(2, dtype=torch.bool)
    square = model.logits(params_C, {}, {"active_C": active, "x_CBF": x})
    flat = model.logits(params_C, {}, {"active_C": active, "x_CBF": x.flatten(2)})
    assert torch.equal(square, flat)
    weight, bias = params_C["conv1.weight"][0], params_C["conv1.bias"][0]
    slow = torch.nn.functional.conv2d(x[0], weight.reshape(3, 2, 3, 3), bias, padding=1).relu()
    pooled = torch.nn.functional.max_pool2d(slow, 2)
    weight, bias = params_C["conv2.weight"][0], params_C["conv2.bias"][0]
    slow = torch.nn.functional.conv2d(pooled, weight.reshape(6, 3, 3, 3), bias, padding=1).relu()
    pooled = torch.nn.functional.max_pool2d(slow, 2).permute(0, 2, 3, 1).flatten(1)
    head = pooled @ params_C["head.weight"][0].t() + params_C["head.bias"][0]
    torch.testing.assert_close(square[0], head, rtol=1e-5, atol=1e-6)


def test_groups_differ_by_shape_and_seeds_give_the_same_start() -> None:
    one, wide = ImageMLP(81, hidden=(16,), classes=3), ImageMLP(81, hidden=(17,), classes=3)
    assert one.group != wide.group
    assert one.group == ImageMLP(81, hidden=(16,), classes=3).group
    assert all(torch.equal(x, one.init(4)[name]) for name, x in one.init(4).items())
    assert not torch.equal(one.init(4)["layer0.weight"], one.init(5)["layer0.weight"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LichenError, match="heads do not divide"):
        TwoLayerTransformer(9, width=10, heads=4, classes=2)
    with pytest.raises(LichenError, match="too small"):
        ImageCNN(3, classes=2)
    with pytest.raises(LichenError, match="at least 2"):
        ImageMLP(3, classes=1)
    model = TwoLayerTransformer(9, width=8, heads=2, classes=2, max_length=4)
    ids = torch.ones(1, 1, 5, dtype=torch.int64)
    batch = {"active_C": torch.tensor([True]), "input_ids_CBT": ids, "attention_mask_CBT": ids}
    with pytest.raises(LichenError, match=r"rows of 5 tokens, the model takes 4"):
        model.logits({k: x[None] for k, x in model.init(0).items()}, {}, batch)
    with pytest.raises(LichenError, match="lacks a leading axis of 2 clients"):
        model.logits(broadcast(model.init(0), 2), {}, batch | {"active_C": torch.tensor([True, True])})
