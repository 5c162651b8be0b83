"""The stacked optimizers against torch.optim, one client at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.clients.training.optimize import ClientOptimizer, clip_C, lr_factor
from lichen.core.errors import LichenError
from lichen.core.tree import norm_C

SHAPES = {"w": (3, 7), "b": (5,), "s": ()}


def trees_of(clients: int, dtype: torch.dtype, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(clients, *s, generator=g, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (ClientOptimizer("sgd", lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
        (
            ClientOptimizer("sgd", lr=0.3, momentum=0.9, weight_decay=0.1),
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
        ),
        (
            ClientOptimizer("adamw", lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
            lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
        ),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("exact", [True, False])
def test_equals_torch_optim_per_client(
    ours: Any, oracle: Any, dtype: torch.dtype, tolerance: float, exact: bool
) -> None:
    clients = 4
    params = trees_of(clients, dtype, 0)
    alone = [{n: x[c].clone().requires_grad_() for n, x in params.items()} for c in range(clients)]
    stepper = [oracle(list(tree.values())) for tree in alone]
    state = ours.init(params)
    taken = [0] * clients
    for t in range(9):
        active = torch.tensor([True, t % 2 == 0, t > 4, t == 3])
        scale = 1.0 - 0.1 * t
        grads = trees_of(clients, dtype, 100 + t)
        params, state = ours.update(grads, state, params, active_C=active, lr_scale=scale, exact=exact)
        for c in range(clients):
            if active[c]:
                taken[c] += 1
                for n, x in alone[c].items():
                    x.grad = grads[n][c].clone()
                for group in stepper[c].param_groups:
                    group["lr"] = ours.lr * scale
                stepper[c].step()
    assert state["step"].tolist() == taken == [9, 5, 4, 1]
    for c in range(clients):
        for n, x in alone[c].items():
            torch.testing.assert_close(params[n][c], x.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_company_changes_no_bit_and_inactive_clients_keep_theirs(name: str) -> None:
    ours = ClientOptimizer(name, lr=0.05, weight_decay=0.01, momentum=0.5 if name == "sgd" else 0.0)
    params, grads = trees_of(8, torch.float32, 0), trees_of(8, torch.float32, 1)
    grads["w"][5] = torch.nan
    active = torch.tensor([True, False] * 4)
    state = ours.init(params)
    for _ in range(3):
        new, after = ours.update(grads, state, params, active_C=active, lr_scale=torch.linspace(0.5, 1, 8))
        for c in range(8):
            one = slice(c, c + 1)
            mine, my_state = ours.update(
                {n: x[one] for n, x in grads.items()},
                {n: x[one] for n, x in state.items()},
                {n: x[one] for n, x in params.items()},
                active_C=active[one],
                lr_scale=torch.linspace(0.5, 1, 8)[one],
            )
            assert all(torch.equal(new[n][one], mine[n]) for n in new)
            assert all(torch.equal(after[n][one], my_state[n]) for n in after)
            if not active[c]:
                assert all(torch.equal(new[n][c], params[n][c]) for n in new)
                assert all(torch.equal(after[n][c], state[n][c]) for n in after)
        assert not torch.equal(new["w"][0], params["w"][0])
        params, state = new, after


@given(max_norm=st.floats(1e-3, 1e3), seed=st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_clip_bounds_each_client_and_spares_small_ones(max_norm: Any, seed: int) -> None:
    grads = trees_of(3, torch.float64, seed)
    grads = {n: x * torch.tensor([0.0, 1.0, 1e4]).view(-1, *[1] * (x.dim() - 1)) for n, x in grads.items()}
    clipped = clip_C(grads, max_norm)
    assert bool((norm_C(clipped) <= max_norm * (1 + 1e-12)).all())
    for c, norm in enumerate(norm_C(grads).tolist()):
        if norm + 1e-6 <= max_norm:
            assert all(torch.equal(clipped[n][c], grads[n][c]) for n in grads)
        else:
            oracle = [grads[n][c].clone().requires_grad_() for n in grads]
            for x in oracle:
                x.grad = x.detach().clone()
            torch.nn.utils.clip_grad_norm_(oracle, max_norm)
            for x, n in zip(oracle, grads, strict=True):
                torch.testing.assert_close(clipped[n][c], x.grad, rtol=1e-10, atol=1e-14)


@given(schedule=st.sampled_from(["constant", "linear", "cosine"]), total=st.integers(1, 50), warmup=st.integers(0, 49))
def test_lr_factor_rises_then_falls_and_is_never_zero_before_the_end(schedule: Any, total: Any, warmup: Any) -> None:
    if warmup >= total:
        with pytest.raises(LichenError, match="warmup"):
            lr_factor(schedule, 0, total, warmup=warmup)
        return
    factors = [lr_factor(schedule, step, total, warmup=warmup) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup] == 1.0
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -1}, {"betas": (1.0, 0.9)}, {"eps": 0}],
)
def test_refuses_values_out_of_range(bad: Any) -> None:
    with pytest.raises(LichenError, match=r"optimizer|ClientOptimizer\.betas"):
        ClientOptimizer(**bad)
    with pytest.raises(LichenError, match="momentum"):
        ClientOptimizer("adamw", momentum=0.9)
    with pytest.raises(LichenError, match="unknown optimizer"):
        ClientOptimizer("lion")
