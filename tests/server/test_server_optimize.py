"""Server optimizers against the paper's formulas, coordinate by coordinate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.server.optimize import ServerAdam, ServerSGD, ServerYogi
from support.flat import updated


def changes(count: int, seed: int = 0) -> Any:
    g = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(4, generator=g, dtype=torch.float64)} for _ in range(count)]


def run(server: Any, steps: Any) -> Any:
    shared = {"w": torch.zeros(4, dtype=torch.float64), "answers.a": torch.ones(2)}
    state = server.init(Shared.of_flat(shared))
    for change in steps:
        shared, state = updated(server, change, state, shared)
    return shared, state


@pytest.mark.parametrize(("nesterov", "momentum"), [(False, 0.0), (False, 0.9), (True, 0.9)])
def test_sgd_equals_torch_on_the_negative_change(nesterov: Any, momentum: Any) -> None:
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    oracle = torch.optim.SGD([w], lr=0.3, momentum=momentum, nesterov=nesterov)
    for change in changes(6):
        w.grad = -change["w"]
        oracle.step()
    shared, state = run(ServerSGD(0.3, momentum=momentum, nesterov=nesterov), changes(6))
    torch.testing.assert_close(shared["w"], w.detach(), rtol=1e-13, atol=1e-13)
    assert set(state) == ({"m/w"} if momentum else set())


@pytest.mark.parametrize("server", [ServerAdam(0.1, betas=(0.8, 0.9)), ServerYogi(0.1, betas=(0.8, 0.9))])
def test_adaptive_equal_the_papers_recursion(server: Any) -> None:
    shared, _ = run(server, changes(6))
    for i in range(4):
        x, m, v = 0.0, 0.0, 1e-6
        for change in changes(6):
            d = float(change["w"][i])
            m = 0.8 * m + 0.2 * d
            if server.rule == "adam":
                v = 0.9 * v + 0.1 * d * d
            else:
                v = v - 0.1 * d * d * (1 if v > d * d else -1 if v < d * d else 0)
            x += 0.1 * m / (math.sqrt(v) + 1e-3)
        assert float(shared["w"][i]) == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("server", [ServerSGD(0.5, momentum=0.9), ServerAdam(), ServerYogi()])
def test_patch_and_answers_are_replaced_and_dense_removes_the_factors(server: Any) -> None:
    shared = {
        "w": torch.zeros(2),
        "still": torch.ones(3),
        "patch.a.left": torch.ones(4, 1),
        "patch.a.right": torch.ones(1, 4),
        "patch.a.b.left": torch.ones(4, 1),
        "answers.text": torch.ones(2),
    }
    state = server.init(Shared.of_flat(shared))
    assert not any("patch" in n or "answers" in n for n in state)
    change = {
        "w": torch.ones(2),
        "patch.a.dense": torch.full((4, 4), 2.0),
        "patch.c.left": torch.ones(3, 1),
        "answers.text": torch.zeros(2),
    }
    new, _ = updated(server, change, state, shared)
    assert set(new) == {"w", "still", "patch.a.dense", "patch.a.b.left", "patch.c.left", "answers.text"}
    assert torch.equal(new["patch.a.dense"], torch.full((4, 4), 2.0))
    assert torch.equal(new["answers.text"], torch.zeros(2))
    assert torch.equal(new["still"], shared["still"])
    assert "patch.a.left" in shared
    assert torch.equal(shared["w"], torch.zeros(2))


def test_refuses_a_change_that_does_not_fit_and_values_out_of_range() -> None:
    for change in ({"v": torch.ones(4)}, {"w": torch.ones(5)}):
        with pytest.raises(LichenError, match="does not fit"):
            run(ServerSGD(), [change])
    for make in (
        lambda: ServerSGD(0.0),
        lambda: ServerSGD(momentum=1.0),
        lambda: ServerSGD(nesterov=True),
        lambda: ServerAdam(betas=(0.9, 1.0)),
        lambda: ServerYogi(tau=0.0),
    ):
        with pytest.raises(LichenError, match=r"federation\.server\.|ServerAdam\."):
            make()


@pytest.mark.parametrize("server", [ServerSGD(), ServerSGD(momentum=0.9), ServerAdam(), ServerYogi()])
def test_a_change_in_float64_lands_on_the_new_value_and_leaves_the_dtypes(server: Any) -> None:
    g = torch.Generator().manual_seed(0)
    shared = {"w": torch.randn(50, generator=g)}
    goal = torch.randn(50, generator=g) * 1e-6
    new, state = updated(
        server, {"w": goal.double() - shared["w"].double()}, server.init(Shared.of_flat(shared)), shared
    )
    assert new["w"].dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in state.values())
    if server == ServerSGD():
        assert torch.equal(new["w"], goal)
        plain, _ = updated(server, {"w": goal - shared["w"]}, {}, shared)
        assert not torch.equal(plain["w"], goal)
