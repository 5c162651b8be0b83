"""SCAFFOLD equals the paper's algorithm written out, corrects drift that averaging cannot, and obeys the laws.

Legend: C clients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from lichen import fl
from lichen.fl.testing import check_gradient_step
from support.toy_cohorts import LoraLinear, Softmax, fold, job, rows

LR = 0.2


def with_control(shared: Any, value: float = 0.0) -> Any:
    return {**shared, **{f"control.{name}": torch.full_like(x, value) for name, x in shared.items()}}


def work_of(model: Any, *links: Any) -> Any:
    return fl.Train(model, optimizer=fl.ClientOptimizer("sgd", lr=LR), gradient_steps=(*links, fl.Scaffold(LR)))


def test_obeys_the_laws_of_a_gradient_step() -> None:
    check_gradient_step(fl.Scaffold(0.1), job(with_control(LoraLinear().init(0), 0.3), [3, 0, 4]))


def oracle(shared: Any, clients: int, rounds: int, data: Any, sampled: Any) -> Any:
    """Algorithm 1 of the paper with option II and a global rate of 1, for softmax regression, one client at a time."""
    x = {name: value.clone() for name, value in shared.items()}
    c = {name: torch.zeros_like(value) for name, value in x.items()}
    c_k = [{name: torch.zeros_like(value) for name, value in x.items()} for _ in range(clients)]
    for r in range(rounds):
        dy, dc = [], []
        for k in sampled(r):
            y = {name: value.clone().requires_grad_() for name, value in x.items()}
            batches = data(r, k)
            for batch in batches:
                logits = functional.linear(batch["x_CBF"][0].double(), y["weight"], y["bias"])
                loss = functional.cross_entropy(logits, batch["labels_CB"][0])
                grads = dict(zip(y, torch.autograd.grad(loss, list(y.values())), strict=True))
                y = {n: (y[n] - LR * (grads[n] - c_k[k][n] + c[n])).detach().requires_grad_() for n in y}
            after = {n: c_k[k][n] - c[n] + (x[n] - y[n].detach()) / (len(batches) * LR) for n in y}
            dy.append({n: y[n].detach() - x[n] for n in y})
            dc.append({n: after[n] - c_k[k][n] for n in y})
            c_k[k] = after
        x = {n: x[n] + sum(d[n] for d in dy) / len(dy) for n in x}
        c = {n: c[n] + sum(d[n] for d in dc) / clients for n in c}
    return x, c, c_k


def test_rounds_equal_the_papers_algorithm() -> None:
    model, clients, rounds = Softmax(), 5, 4
    shared = model.init(0)

    def sampled(r: int) -> list[int]:
        return [(r + k) % clients for k in (0, 2, 3)]

    def data(r: int, k: int) -> Any:
        return [rows(10 * r + t, [k]) for t in range(3)]

    x, c, c_k = oracle(shared, clients, rounds, data, sampled)
    work, state, kept = work_of(model), with_control(shared), {}
    for r in range(rounds):
        messages = []
        for k in sampled(r):
            message, kept[k] = fold(work, job(state, [k], version=r), data(r, k), kept.get(k))
            messages.append(message)
        assert set(messages[0].tensors) == set(state)
        mean = {n: torch.stack([m.tensors[n][0] for m in messages]).mean(0) for n in state}
        # The control variates are averaged over the roster, not over who came.
        share = {n: len(messages) / clients if n.startswith("control.") else 1.0 for n in state}
        state = {n: value + share[n] * mean[n] for n, value in state.items()}
    for name in shared:
        torch.testing.assert_close(state[name], x[name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state[f"control.{name}"], c[name], rtol=1e-9, atol=1e-11)
        for k, own in kept.items():
            torch.testing.assert_close(own[f"step/scaffold/{name}"][0], c_k[k][name], rtol=1e-9, atol=1e-11)


def test_a_control_variate_is_the_mean_of_the_gradients_that_a_client_has_seen() -> None:
    model, shared = Softmax(), Softmax().init(0)
    batches = [rows(t, range(3), active=[True, t < 1, False]) for t in range(2)]
    message, own = fold(work_of(model), job(with_control(shared), range(3)), batches)
    plain, _ = fold(fl.Train(model, optimizer=fl.ClientOptimizer("sgd", lr=LR)), job(shared, range(3)), batches)
    for name in shared:
        for c, steps in ((0, 2), (1, 1)):
            expected = -plain.tensors[name][c] / (steps * LR)
            torch.testing.assert_close(own[f"step/scaffold/{name}"][c], expected, rtol=1e-12, atol=0)
        assert not own[f"step/scaffold/{name}"][2].any()
        assert torch.equal(message.tensors[f"control.{name}"], own[f"step/scaffold/{name}"])


def test_the_jobs_rate_counts_and_frozen_tensors_are_left_alone() -> None:
    model = LoraLinear()
    shared = {**model.init(0), "layer.lora_B": torch.full((4, 2), 0.1)}
    batch = rows(0, range(2), features=6, classes=4)
    asked = [job(with_control(shared), range(2), settings={"lr_scale": scale}) for scale in (1.0, 0.25)]
    whole, small = (fold(work_of(model), one, [batch])[1] for one in asked)
    for name in shared:
        torch.testing.assert_close(small[f"step/scaffold/{name}"], whole[f"step/scaffold/{name}"], rtol=1e-4, atol=1e-6)
    train = fl.Train(
        model,
        optimizer=fl.ClientOptimizer("sgd", lr=LR),
        gradient_steps=(fl.Scaffold(LR),),
        freeze_schedule=(("lora_A",),),
    )
    message, own = fold(train, job(with_control(shared), range(2)), [batch])
    assert set(message.tensors) == {"layer.lora_B", "control.layer.lora_B"}
    assert set(own) == {"step/scaffold/layer.lora_A", "step/scaffold/layer.lora_B"}


def test_it_reaches_the_optimum_that_averaging_drifts_from() -> None:
    """Two clients whose classes are apart, many local steps: the pooled optimum is where the mean gradient vanishes."""
    model = Softmax(features=2, classes=2)
    data = {
        k: {
            "active_C": torch.tensor([True]),
            "x_CBF": torch.tensor([[[1.0, 0.2], [0.3, 1.0], [0.8 - 2 * k, 0.5]]]),
            "labels_CB": torch.tensor([[k, 1 - k, k]]),
            "index_CB": torch.arange(3)[None],
        }
        for k in range(2)
    }

    def slope(shared: Any) -> float:
        tree = {n: x[None].clone().requires_grad_() for n, x in fl.Shared.of_flat(shared).trainable.items()}
        loss = sum(model.loss(tree, {}, batch)[0].sum() for batch in data.values()) / 6
        loss = loss + 0.05 * sum(x.square().sum() for x in tree.values())
        return float(sum(g.square().sum() for g in torch.autograd.grad(loss, list(tree.values()))).sqrt())

    found = {}
    for name in ("averaging", "scaffold"):
        state, kept = with_control(model.init(0)), {}
        decay = fl.WeightDecay(0.1)  # makes the optimum one
        plain = fl.Train(model, optimizer=fl.ClientOptimizer("sgd", lr=LR), gradient_steps=(decay,))
        work = plain if name == "averaging" else work_of(model, decay)
        for r in range(100):
            messages = []
            for k in range(2):
                message, kept[k] = fold(work, job(state, [k], version=r), [data[k]] * 10, kept.get(k))
                messages.append(message)
            change = {n: sum(m.tensors[n][0] for m in messages) / 2 for n in messages[0].tensors}
            state = {n: x + change[n] if n in change else x for n, x in state.items()}
        found[name] = slope(state)
    assert found["averaging"] > 1e-3
    assert found["scaffold"] < 1e-6


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(fl.LichenError, match="did not come down"):
        fold(work_of(Softmax()), job(Softmax().init(0), [0]), [])
    with pytest.raises(fl.LichenError, match="not positive"):
        fl.Scaffold(0.0)
