"""What a client needs: counted bytes held against sums done by hand, and orders that must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.recipes.assemble.live_bytes import LiveBytes
from lichen.recipes.plan.footprint import footprint, frozen_tensors, peak_bytes
from lichen.recipes.schema.read import read_recipe

QUICK = ["optimizer.lr=0.1", "federation.local_steps=2"]


def test_the_peak_of_births_and_ends() -> None:
    with LiveBytes() as live:
        a = torch.zeros(100)
        for _ in range(5):
            b = torch.ones(50)
            del b
        view, same = a.view(10, 10), a.add_(1)
    assert live.peak == 600
    assert live.now == 400
    assert view.data_ptr() == same.data_ptr()


def test_what_was_there_before_does_not_count() -> None:
    weights = torch.zeros(1000)
    with peak_bytes("cpu") as told:
        part = weights[:10]
        whole = part + 1
    assert told == [40]
    assert whole.shape == (10,)


def test_the_way_back_is_counted() -> None:
    def most(grad: bool) -> int:
        x = torch.zeros(64, 64, requires_grad=grad)
        with LiveBytes() as live:
            y = x
            for _ in range(8):
                y = torch.tanh(y @ x)
            if grad:
                y.sum().backward()
        return live.peak

    one = 64 * 64 * 4
    assert most(False) <= 4 * one
    assert most(True) >= 8 * one


def test_shared_weights_are_held_once() -> None:
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert sum(x.untyped_storage().nbytes() for x in frozen_tensors(torch.nn.Sequential(first, second))) == 64
    assert frozen_tensors(None) == ()


def test_a_client_of_a_student_has_no_frozen_part() -> None:
    found = footprint(read_recipe("digits", QUICK))
    assert found is not None
    assert found.frozen == 0
    assert found.whole == found.training
    size = 4 * (64 * 64 + 64 + 64 * 10 + 10)  # float32 weights of the student
    assert 4 * size <= found.training <= 20 * size


@pytest.mark.parametrize(("key", "less", "more"), [("federation.batch_size", 4, 400), ("model.student.width", 16, 64)])
def test_less_is_less(key: str, less: int, more: int) -> None:
    small, large = (footprint(read_recipe("digits", [*QUICK, f"{key}={n}"])) for n in (less, more))
    assert small is not None
    assert large is not None
    assert small.training < large.training
    assert footprint(read_recipe("digits", [*QUICK, f"{key}={less}"])) == small, "the same number every time"


def test_tasks_without_local_training_have_none(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"task": "oneshot", "model": {"name": "nosuch"}, "data": {"name": "nosuch"}}
    assert footprint(read_recipe(recipe)) is None


def test_students_of_an_exchange_have_no_footprint_in_common() -> None:
    assert footprint(read_recipe("digits-unequal")) is None
