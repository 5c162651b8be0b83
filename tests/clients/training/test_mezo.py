"""Zeroth order: slopes against autograd, steps against the formula, memory, company, diverged clients."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch

from lichen.clients.training.mezo import ZerothOrder, both_sides, shift
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.conventions.directions import UNIT, draw_direction
from lichen.core.errors import LichenError
from lichen.core.message import concatenate_messages, pack_message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated
from support.toy_cohorts import Bigram, LoraLinear, Softmax, fold, job, rows

KINDS = ("signs", "bell")


def direction(tree: Tree, seed: int, kind: str) -> Any:
    return {n: draw_direction(seed, n, 0, x.numel(), kind).double().view(x.shape) * UNIT[kind] for n, x in tree.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_slope_is_the_derivative_along_the_direction(kind: str) -> None:
    model, batch, seeds = Softmax(), rows(0, range(3)), [11, 12, 13]
    params_C = trees.broadcast(model.init(0), 3)
    leaves_C = {n: x.clone().requires_grad_() for n, x in params_C.items()}
    loss_C, count_C = model.loss(leaves_C, {}, batch)
    grads_C = dict(zip(leaves_C, torch.autograd.grad((loss_C / count_C).sum(), list(leaves_C.values())), strict=True))
    sides = both_sides(model, params_C, {}, {}, batch, seeds, eps=1e-4, kind=kind)
    for c, seed in enumerate(seeds):
        z = direction(model.init(0), seed, kind)
        true = sum(float((grads_C[n][c] * z[n]).sum()) for n in z)
        assert float(sides.slope_C[c]) == pytest.approx(true, rel=1e-6, abs=1e-8)
    torch.testing.assert_close(sides.loss_C, loss_C.detach().double(), rtol=1e-6, atol=0)
    assert torch.equal(sides.count_C, count_C.double())


@pytest.mark.parametrize("kind", KINDS)
def test_looking_to_both_sides_and_back_leaves_the_tensors_where_they_were(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    params_C = {"w": torch.randn(2, 300, 300, generator=g) * 0.05}
    before = params_C["w"].clone()
    for factor in (1e-3, -2e-3, 1e-3):
        shift(params_C, [5, None], [factor, 1.0], kind)
    assert torch.equal(params_C["w"][1], before[1])
    # Three roundings, each of half a unit in the last place of a number that is at most a little larger.
    last = torch.finfo(torch.float32).eps * (before[0].abs() + 8e-3)
    assert bool(((params_C["w"][0] - before[0]).abs() <= 2 * last).all())
    assert float((params_C["w"][0] - before[0]).abs().max()) < 1e-7


def test_two_steps_are_the_formula_for_each_client() -> None:
    model, lr, eps = Softmax(), 0.05, 1e-3
    shared, batches = model.init(0), [rows(t, range(3), active=[True, t < 1, True]) for t in range(2)]
    work = ZerothOrder(model, lr=lr, eps=eps)
    message, own = fold(work, job(shared, range(3), settings={"lr_scale": 0.5}), batches)
    assert own is None
    assert message.metrics["steps"].tolist() == [2, 1, 2]
    assert message.weight_C.tolist() == [8, 4, 8]
    for c in range(3):
        at = {n: x.clone() for n, x in shared.items()}
        for t, batch in enumerate(batches):
            if not batch["active_C"][c]:
                continue
            z, mine = direction(at, derive(1, c, "direction", t), "signs"), {n: x[c : c + 1] for n, x in batch.items()}
            sides = []
            for sign in (1, -1):
                loss_C, count_C = model.loss({n: (x + sign * eps * z[n])[None] for n, x in at.items()}, {}, mine)
                sides.append(float(loss_C[0]) / int(count_C[0]))
            slope = (sides[0] - sides[1]) / (2 * eps)
            at = {n: x - 0.5 * lr * slope * z[n] for n, x in at.items()}
        for n in shared:
            torch.testing.assert_close(message.tensors[n][c], at[n] - shared[n], rtol=1e-9, atol=1e-12)


def test_together_and_alone_give_the_same_bytes() -> None:
    model = Softmax(dtype=torch.float32)
    shared, work = model.init(0), ZerothOrder(model, lr=0.05)
    together, _ = fold(work, job(shared, range(3)), [rows(t, range(3), active=[True, t != 1, True]) for t in range(3)])
    alone = [
        fold(work, job(shared, [c]), [rows(t, [c], active=[t != 1 or c != 1]) for t in range(3)])[0] for c in range(3)
    ]
    assert pack_message(together) == pack_message(concatenate_messages(alone))
    again, _ = fold(work, job(shared, range(3), seed=2), [rows(t, range(3)) for t in range(3)])
    assert not torch.equal(again.tensors["weight"], together.tensors["weight"])


def test_a_diverged_client_and_one_without_rows_cannot_poison_the_sum() -> None:
    model = Softmax()
    shared, batch = model.init(0), rows(0, range(3), active=[True, True, False])
    batch["x_CBF"][1, 0, 0] = torch.nan
    batch["x_CBF"][2] = torch.nan
    message, _ = fold(ZerothOrder(model, lr=0.1), job(shared, range(3)), [batch])
    assert message.metrics["failed"].tolist() == [0, 1, 0]
    assert message.weight_C.tolist() == [4, 0, 0]
    assert message.tensors["weight"][0].any()
    assert all(not x[1:].any() for x in message.tensors.values())
    assert all(x.isfinite().all() for x in [*message.tensors.values(), *message.metrics.values()])


def test_frozen_names_stay_and_the_clip_bounds_a_step() -> None:
    model = LoraLinear()
    shared = {**model.init(0), "patch.layer.dense": torch.ones(4, 6)}
    batch = rows(0, range(2), features=6, classes=4)
    work = ZerothOrder(model, lr=0.1, clip=0.01, freeze_schedule=(("lora_A",),))
    message, _ = fold(work, job(shared, range(2)), [batch])
    assert set(message.tensors) == {"layer.lora_B"}
    assert float(message.tensors["layer.lora_B"].abs().max()) == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(LichenError, match="no tensor is left"):
        fold(ZerothOrder(model, lr=0.1, freeze_schedule=(("lora_A", "lora_B"),)), job(shared, [0]), [])


def test_tokens_and_labels_are_counted_as_training_counts_them() -> None:
    ids = torch.tensor([[[1, 2, 3, 0], [2, 3, 0, 0]]])
    mask = (ids > 0).long()
    batch = {
        "active_C": torch.tensor([True]),
        "input_ids_CBT": ids,
        "attention_mask_CBT": mask,
        "labels_CBT": ids.masked_fill(mask == 0, -100),
    }
    model = Bigram()
    message, _ = fold(ZerothOrder(model, lr=0.1, weigh_by="tokens"), job(model.init(0), [0]), [batch, batch])
    assert message.metrics["tokens"].tolist() == message.weight_C.tolist() == [10]
    assert message.metrics["count"].tolist() == [6]


def test_rounds_of_it_learn() -> None:
    model, server, mean = Softmax(dtype=torch.float32), ServerSGD(), Mean()
    shared, batch = model.init(0), rows(0, range(4), count=16)
    batch["labels_CB"] = batch["x_CBF"][..., :3].argmax(-1)
    work, losses = ZerothOrder(model, lr=0.1), []
    for t in range(15):
        message, _ = fold(work, job(shared, range(4), version=t, seed=t), [batch] * 8)
        losses.append(float(message.metrics["loss_sum"].sum() / message.metrics["count"].sum()))
        change, _ = closed(mean, mean.add(mean.zero(), message), shared)
        shared, _ = updated(server, change, {}, shared)
    assert losses[-1] < losses[0] - 0.1


def test_a_step_holds_no_second_copy_of_what_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts every allocation torch makes in a step on a model of 4 MB."""

    class Wide(Softmax):
        def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Any:
            return trainable_C["weight"].flatten(1)[:, :8].sum(1), torch.ones(1)

    model = Wide(features=250_000, classes=4, dtype=torch.float32)
    work = ZerothOrder(model, lr=1e-3)
    state = work.init(job({"weight": torch.zeros(4, 250_000)}, [0]), [0], None)
    batch = {"active_C": torch.ones(1, dtype=torch.bool)}
    place = state.params_C["weight"].data_ptr()
    with torch.profiler.profile(profile_memory=True) as told:
        after = work.step(state, batch)
    now, most = 0, 0
    for event in told.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    assert after.params_C["weight"].data_ptr() == place
    assert 0 < most < 2**20
    tracemalloc.start()
    work.step(after, batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("bad", [{"lr": 0}, {"eps": -1.0}, {"clip": 0.0}, {"weigh_by": "age"}, {"kind": "cauchy"}])
def test_refuses_values_out_of_range(bad: Any) -> None:
    with pytest.raises(LichenError, match="zeroth_order"):
        ZerothOrder(Softmax(), **{"lr": 0.1, **bad})
