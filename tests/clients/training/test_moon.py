"""MOON equals the paper's loss written out, keeps the client's last model, and is the same in any company.

Legend: B rows, H numbers of a representation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lichen import fl
from lichen.clients.training.corrections.moon import Moon
from lichen.core.errors import LichenError
from lichen.models.students.students import ImageCNN, ImageMLP
from support.toy_cohorts import Softmax, fold, job, rows

LR, MU, TAU = 0.3, 2.0, 0.5
MODEL = ImageMLP(6, classes=3, hidden=(5,))
Tree = dict[str, Tensor]


def work_of(model: Any = MODEL, **more: Any) -> Moon:
    train = fl.Train(model, optimizer=fl.ClientOptimizer("sgd", lr=LR), gradient_steps=(fl.Clip(0.9),))
    return Moon(train, weight=MU, temperature=TAU, **more)


def hidden(params: Tree, x_BF: Tensor) -> Tensor:
    return torch.relu(x_BF @ params["layer0.weight"].T + params["layer0.bias"])


def paper(start: Tree, batches: list[Any], last: Tree | None) -> Tree:
    """A client's round: Algorithm 1 of the paper, with the gradient cut to a norm as the recipe does it."""
    own = last or start
    y = dict(start)
    for batch in batches:
        x_BF, label_B = batch["x_CBF"][0], batch["labels_CB"][0]
        x_BF, label_B = x_BF[label_B >= 0], label_B[label_B >= 0]
        leaves = {n: v.clone().requires_grad_() for n, v in y.items()}
        z_BH = hidden(leaves, x_BF)
        logits = z_BH @ leaves["layer1.weight"].T + leaves["layer1.bias"]
        near = functional.cosine_similarity(z_BH, hidden(start, x_BF), dim=-1) / TAU
        far = functional.cosine_similarity(z_BH, hidden(own, x_BF), dim=-1) / TAU
        contrast = -torch.log(near.exp() / (near.exp() + far.exp()))
        loss = functional.cross_entropy(logits, label_B) + MU * contrast.mean()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        norm = float(sum(g.square().sum() for g in grads)) ** 0.5
        y = {n: v - LR * g * min(1.0, 0.9 / norm) for (n, v), g in zip(y.items(), grads, strict=True)}
    return y


def batches_of(client: int, r: int) -> list[Any]:
    return [rows(20 * r + t, [client], features=6) for t in range(3)]


def test_rounds_are_the_papers() -> None:
    shared, own = MODEL.init(0), None
    last: Tree | None = None
    plain = fl.Train(MODEL, optimizer=fl.ClientOptimizer("sgd", lr=LR), gradient_steps=(fl.Clip(0.9),))
    for r in range(3):
        batches = batches_of(4, r)
        message, own = fold(work_of(), job(shared, [4], version=r), batches, own)
        last = paper(shared, batches, last)
        for name, x in last.items():
            torch.testing.assert_close(shared[name] + message.tensors[name][0], x, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own[f"moon/{name}"][0], x, rtol=1e-4, atol=1e-5)
        without, _ = fold(plain, job(shared, [4], version=r), batches, None)
        equal = all(torch.allclose(message.tensors[n], x, atol=1e-5) for n, x in without.tensors.items())
        assert equal == (r == 0)  # a client's first training has nothing to be held off
        shared = {n: x + 0.5 * message.tensors[n][0] for n, x in shared.items()}


def test_a_client_is_the_same_in_any_company() -> None:
    shared = MODEL.init(0)
    _, own_C = fold(work_of(), job(shared, [3, 0, 4]), [rows(t, [3, 0, 4], features=6) for t in range(2)], None)
    together, kept_C = fold(
        work_of(), job(shared, [3, 0, 4], version=1), [rows(9 + t, [3, 0, 4], features=6) for t in range(2)], own_C
    )
    for place, client in enumerate((3, 0, 4)):
        one = {n: x[place : place + 1] for n, x in own_C.items()}
        alone, kept = fold(
            work_of(), job(shared, [client], version=1), [rows(9 + t, [client], features=6) for t in range(2)], one
        )
        assert all(torch.equal(x[0], together.tensors[n][place]) for n, x in alone.tensors.items())
        assert all(torch.equal(x[0], kept_C[n][place]) for n, x in kept.items())


def test_who_takes_no_step_keeps_the_model_of_its_last_training() -> None:
    shared = MODEL.init(0)
    _, own = fold(work_of(), job(shared, [1]), batches_of(1, 0), None)
    later = {n: x + 1 for n, x in shared.items()}
    _, kept = fold(work_of(), job(later, [1], version=1), [], own)
    assert all(torch.equal(x, own[n]) for n, x in kept.items())


@pytest.mark.parametrize("model", [MODEL, ImageCNN(8, classes=3, width=2)])
def test_features_are_what_the_last_layer_reads(model: Any) -> None:
    params_C = {n: x[None] for n, x in model.init(1).items()}
    batch = rows(0, [0], features=6 if model is MODEL else 64)
    z_CBH = model.features(params_C, batch)
    head = model.head
    logits = z_CBH @ params_C[f"{head}.weight"].mT + params_C[f"{head}.bias"]
    torch.testing.assert_close(logits, model.logits(params_C, {}, batch), rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_small_and_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(LichenError, match="last layer of a small model"):
        work_of(Softmax())
    with pytest.raises(LichenError, match=r"optimizer\.contrast"):
        Moon(work_of().inner, weight=0.0)
