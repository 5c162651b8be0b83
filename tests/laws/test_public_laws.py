"""The laws of lichen.fl.testing: members obey them, and each law finds the member that breaks it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen import fl
from lichen.core.wire.shared import Shared
from lichen.fl.testing import LAWS, check_aggregator, check_client_task

SHARED = {"w": torch.zeros(3)}


def message(clients: int = 7) -> fl.Message:
    g = torch.Generator().manual_seed(1)
    return fl.Message(
        group="g",
        client_C=torch.arange(clients),
        version_C=torch.zeros(clients, dtype=torch.int64),
        tensors={"w": torch.randn(clients, 3, generator=g) * 1e3},
        weight_C=torch.rand(clients, generator=g, dtype=torch.float64) + 0.5,
    )


class FloatSum:
    """A plain mean in floats; its bytes hang on the order. A total is a tensor, a weight and the clients."""

    needs: Any = "single"

    def lift(self, message: fl.Message, discount_C: Any = None) -> Any:
        raise fl.LichenError("needs single messages")

    def zero(self) -> Any:
        return (torch.zeros(3), 0.0, 0)

    def add(self, total: Any, message: fl.Message, discount_C: Any = None) -> Any:
        weight_C = message.weight_C if discount_C is None else message.weight_C * discount_C
        for x, w in zip(message.tensors["w"], weight_C.tolist(), strict=True):
            total = (total[0] + w * x, total[1] + w, total[2] + 1) if w else total
        return total

    def clients(self, total: Any) -> int:
        return int(total[2])

    def merge(self, a: Any, b: Any) -> Any:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def close(self, total: Any, shared: fl.Shared) -> Any:
        if not total[1]:
            raise fl.LichenError("no client contributed")
        return fl.Shared({"w": total[0] / total[1]}), {}

    def dump(self, total: Any) -> Any:
        return {"w": total[0]}, {"weight": total[1], "clients": total[2]}

    def load(self, tensors: fl.Tree, header: Any) -> Any:
        return tensors["w"], header["weight"], header["clients"]


class Largest(FloatSum):
    """The entrywise largest change: right in any order, unless a part of it is broken on purpose."""

    def add(self, total: Any, message: fl.Message, discount_C: Any = None) -> Any:
        counted = message.tensors["w"][message.weight_C > 0]
        return self.merge(total, (counted.amax(0), 1.0, len(counted))) if len(counted) else total

    def merge(self, a: Any, b: Any) -> Any:
        if not a[1] or not b[1]:
            return a if a[1] else b
        return torch.maximum(a[0], b[0]), 1.0, a[2] + b[2]


class Mutates(Largest):
    def merge(self, a: Any, b: Any) -> Any:
        if a[1] and b[1]:
            a[0].copy_(torch.maximum(a[0], b[0]))
        return a if a[1] else b


class CountsEverybody(Largest):
    def add(self, total: Any, message: fl.Message, discount_C: Any = None) -> Any:
        return self.merge(total, (message.tensors["w"].amax(0), 1.0, len(message.weight_C)))


class Forgets(Largest):
    def load(self, tensors: fl.Tree, header: Any) -> Any:
        return tensors["w"] * 0, 1.0, 1


class CountsZero(Largest):
    def merge(self, a: Any, b: Any) -> Any:
        return torch.maximum(a[0], b[0]) + 1.0, a[1] + b[1], a[2] + b[2]


class CountsMessages(Largest):
    def clients(self, total: Any) -> int:
        return int(total[1])


class DiscountsOnes(Largest):
    def add(self, total: Any, message: fl.Message, discount_C: Any = None) -> Any:
        total = super().add(total, message)
        return total if discount_C is None else (total[0] * 0.5, *total[1:])


class OfMean:
    """The mean, with one part broken."""

    def __getattr__(self, name: str) -> Any:
        return getattr(fl.Mean(), name)


class LiftsNothing(OfMean):
    def lift(self, message: fl.Message, discount_C: Any = None) -> Any:
        return message


class LooksUnderMasks(OfMean):
    def add(self, total: Any, message: fl.Message, discount_C: Any = None) -> Any:
        if message.tensors["w"].dtype == torch.int64:
            clamped = {name: x.clamp(-(2**60), 2**60) for name, x in message.tensors.items()}
            message = replace(message, tensors=clamped)
        return fl.Mean().add(total, message, discount_C)


class SingleThatLifts(Largest):
    def lift(self, message: fl.Message, discount_C: Any = None) -> Any:
        return message


@pytest.mark.parametrize("member", [fl.Mean(), Largest()], ids=["mean", "largest"])
def test_members_obey(member: Any) -> None:
    for seed in range(5):
        check_aggregator(member, message(), Shared.of_flat(SHARED), seed=seed)


@pytest.mark.parametrize(
    ("law", "member", "says"),
    [
        ("order", FloatSum(), "in another order"),
        ("pure", Mutates(), "as it is"),
        ("weight_zero", CountsEverybody(), "weight 0"),
        ("crossing", Forgets(), "dumped and loaded"),
        ("monoid", CountsZero(), "associative|zero changes nothing"),
        ("clients", CountsMessages(), "clients counts"),
        ("discount", DiscountsOnes(), "a discount of 1"),
        ("lifting", LiftsNothing(), "is int64"),
        ("lifting", LooksUnderMasks(), "masks"),
        ("lifting", SingleThatLifts(), "lifts none"),
    ],
)
def test_each_law_finds_who_breaks_it(law: str, member: Any, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        LAWS[law](member, message(), Shared.of_flat(SHARED), 3)
    with pytest.raises(AssertionError):
        check_aggregator(member, message(), Shared.of_flat(SHARED), seed=3)


class Network(fl.Student):
    inputs = ("x_CBF",)

    def shapes(self) -> Any:
        return {"out.weight": (2, 4), "out.bias": (2,)}

    def apply(self, params: fl.Tree, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[0] @ params["out.weight"].T + params["out.bias"]


class NormOfAll:
    """Local steps, cut by the norm of all clients of a block together: what a work must not do."""

    def __init__(self, inner: fl.Train) -> None:
        self.inner = inner

    def expected(self, job: fl.Job) -> fl.Expected:
        return self.inner.expected(job)

    def init(self, job: fl.Job, clients: Any, own_C: Any) -> Any:
        return self.inner.init(job, clients, own_C)

    def step(self, state: Any, batch: fl.Batch) -> Any:
        return self.inner.step(state, batch)

    def final(self, state: Any) -> Any:
        sent, own_C = self.inner.final(state)
        norm = sum(float(x_C.norm()) for x_C in sent.tensors.values())
        for name in sent.tensors:
            sent.tensors[name] = sent.tensors[name] / norm
        return sent, own_C


def test_a_client_may_not_depend_on_its_company(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    shards = [
        fl.ArrayShard(draw.normal(size=(12, 4)).astype(np.float32), labels=draw.integers(0, 2, 12)) for _ in range(3)
    ]
    network = Network(2, name="network")
    source = fl.TrainSource(shards, batch_size=4, steps=3)
    job = fl.Job(work="train", shared=Shared(network.init(0)), version=0, clients=(0, 1, 2), seed=5)
    train = fl.Train(network, personal=False)
    check_client_task(fl.ClientTask(work=train, source=source), job)
    check_client_task(fl.ClientTask(work=fl.Train(network, personal=True), source=source), job)
    with pytest.raises(AssertionError, match="tensors of client 0 depends on who stands beside it"):
        check_client_task(fl.ClientTask(work=NormOfAll(train), source=source), job)
