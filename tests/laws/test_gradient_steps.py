"""Every gradient step is independent of company, leaves no trace of a step that did not happen, and goes on as it was.

Legend: C clients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen import fl
from lichen.clients.training.corrections.feddyn import FedDyn
from lichen.clients.training.corrections.fednova import Reach
from lichen.clients.training.diloco import Worker
from lichen.clients.training.gradient_steps import GradientChain
from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.message import pack_message, take_client
from lichen.core.wire.shared import Shared
from lichen.fl.testing import check_gradient_step
from lichen.server.optimize import ServerSGD
from support.flat import closed, updated
from support.toy_cohorts import LoraLinear, Softmax, fold, job, rows


@dataclass(frozen=True)
class Memory:
    """Adds the mean of a client's gradients so far, and sends how it changed: what a step with state looks like."""

    name: str = "memory"
    weight: float = 0.5

    def own(self, trainable_C: Any) -> Any:
        return trees.zeros_like(trainable_C)

    def sends(self, trained: Any) -> Any:
        return {f"{self.name}.{n}": spec for n, spec in trained.items()}

    def init(self, job: Any, clients: Any, params_C: Any, own_C: Any) -> Any:
        mine = {n: own_C[n] for n in params_C}
        return trees.join("sum/", trees.zeros_like(params_C), trees.join("own/", mine, {}))

    def update(self, grads_C: Any, state: Any, params_C: Any, *, active_C: Any, exact: bool) -> Any:
        total, rest = trees.split(state, "sum/")
        mine, _ = trees.split(rest, "own/")
        column = active_C.view(-1, 1)
        total = {n: torch.where(column.view(-1, *[1] * (x.dim() - 1)), x + grads_C[n], x) for n, x in total.items()}
        return trees.add(grads_C, trees.scale(mine, self.weight)), trees.join("sum/", total, rest)

    def final(self, state: Any, delta_C: Any, steps_C: Any) -> Any:
        total, rest = trees.split(state, "sum/")
        mine, _ = trees.split(rest, "own/")

        def mean(x: Any, y: Any) -> Any:
            steps = steps_C.to(x).view(-1, *[1] * (x.dim() - 1))
            return torch.where(steps > 0, x / steps.clamp(min=1), y)

        after = trees.map_tree(mean, total, mine)
        return trees.join(f"{self.name}.", trees.sub(after, mine), {}), after


FAMILY: dict[str, Any] = {
    "clip": fl.Clip(0.7),
    "proximal": fl.Proximal(0.3),
    "weight_decay": fl.WeightDecay(0.1),
    "memory": Memory(),
    "feddyn": FedDyn(0.1),
    "fednova": Reach(lr=0.1, momentum=0.9, prox=0.2),
    "chain": GradientChain((fl.Clip(0.7), Memory(), fl.Proximal(0.1), Memory("other", 0.2), fl.WeightDecay(0.1))),
    "no chain": GradientChain(()),
}


@pytest.mark.parametrize("name", FAMILY)
def test_obeys_the_laws(name: str) -> None:
    model = LoraLinear()
    check_gradient_step(FAMILY[name], job({**model.init(0), "patch.layer.dense": torch.ones(4, 6)}, [3, 0, 4]))


@dataclass(frozen=True)
class Broken(Memory):
    """A memory with a fault."""

    fault: str = ""

    def update(self, grads_C: Any, state: Any, params_C: Any, *, active_C: Any, exact: bool) -> Any:
        if self.fault == "company":
            mean = {n: x + x.nan_to_num().mean(0) for n, x in grads_C.items()}
            return super().update(mean, state, params_C, active_C=active_C, exact=exact)
        if self.fault == "trace":
            on = torch.ones_like(active_C)
            return super().update(grads_C, state, params_C, active_C=on, exact=exact)
        if self.fault == "changed":
            state["sum/layer.lora_A"] += 1
        if self.fault == "fast" and not exact:
            return super().update(trees.scale(grads_C, 1.1), state, params_C, active_C=active_C, exact=exact)
        return super().update(grads_C, state, params_C, active_C=active_C, exact=exact)

    def final(self, state: Any, delta_C: Any, steps_C: Any) -> Any:
        sent, after = super().final(state, delta_C, steps_C)
        if self.fault == "sends":
            sent = trees.map_tree(lambda x: x + 1, sent)
        return sent, trees.scale(after, 0.5) if self.fault == "forgets" else after


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("company", "who stands beside"),
        ("trace", "leaves a trace|goes on otherwise"),
        ("changed", "as it is"),
        ("fast", "but for rounding"),
        ("sends", "sends zeros"),
        ("forgets", "keeps what it had"),
    ],
)
def test_each_law_finds_what_breaks_it(fault: str, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_gradient_step(Broken(fault=fault), job(LoraLinear().init(0), [3, 0, 4]))


def after(steps: Any, grads: Any, params: Any, shared: Any) -> Any:
    chain = GradientChain(tuple(steps))
    active = torch.ones(2, dtype=torch.bool)
    state = chain.init(job(shared, [0, 1]), [0, 1], params, chain.own(params))
    return chain.update(grads, state, params, active_C=active, exact=True)[0]["w"]


def test_the_order_of_a_chain_is_what_it_says() -> None:
    grads, params, shared = {"w": torch.tensor([[3.0, 4.0]] * 2)}, {"w": torch.ones(2, 2)}, {"w": torch.zeros(2)}
    clip, pull = fl.Clip(1.0), fl.Proximal(10.0)
    torch.testing.assert_close(after([clip, pull], grads, params, shared)[0], torch.tensor([10.6, 10.8]))
    assert after([pull, clip], grads, params, shared)[0].norm() < 1
    nested = [GradientChain((clip,)), GradientChain((pull, fl.WeightDecay(0.1)))]
    flat = [clip, pull, fl.WeightDecay(0.1)]
    assert torch.equal(after(nested, grads, params, shared), after(flat, grads, params, shared))
    assert torch.equal(after([], grads, params, shared), grads["w"])


@pytest.mark.parametrize("reference", [True, False])
def test_decay_at_the_end_of_a_chain_has_the_bits_of_the_optimizers(reference: bool) -> None:
    model = fl.ImageMLP(5, hidden=(7,), classes=3, reference=reference)
    batches = [rows(t, range(3), active=[True, t < 2, t != 1]) for t in range(4)]
    steps = (fl.Clip(0.3), fl.Proximal(0.2))
    sgd = fl.ClientOptimizer("sgd", lr=0.2, momentum=0.9)
    link = fl.Train(model, optimizer=sgd, gradient_steps=(*steps, fl.WeightDecay(0.05)))
    field = fl.Train(model, optimizer=replace(sgd, weight_decay=0.05), gradient_steps=steps)
    one, other = (fold(work, job(model.init(0), range(3)), batches)[0] for work in (link, field))
    assert pack_message(one) == pack_message(other)


def test_what_a_step_keeps_is_private_state_and_what_it_sends_leaves_beside_the_change() -> None:
    model, shared = Softmax(), Softmax().init(0)
    work = fl.Train(model, gradient_steps=(fl.Clip(0.5), Memory()))
    first, own = fold(work, job(shared, range(2)), [rows(t, range(2)) for t in range(3)], {"other": torch.ones(2)})
    assert set(first.tensors) == {"weight", "bias", "memory.weight", "memory.bias"}
    assert set(own) == {"step/memory/weight", "step/memory/bias", "other"}
    assert torch.equal(own["step/memory/bias"], first.tensors["memory.bias"])
    second, later = fold(work, job(shared, range(2), version=1), [rows(7, range(2))], own)
    assert not torch.equal(later["step/memory/bias"], own["step/memory/bias"])
    change = later["step/memory/bias"] - own["step/memory/bias"]
    assert torch.equal(second.tensors["memory.bias"], change)
    alone, kept = fold(replace(work, personal=True), job(shared, range(2)), [rows(t, range(2)) for t in range(3)])
    assert alone.tensors == {}
    assert torch.equal(kept["step/memory/bias"], own["step/memory/bias"])


@pytest.mark.parametrize("reference", [True, False])
def test_in_personal_training_the_pull_is_to_the_shared_tensors(reference: bool) -> None:
    """Ditto's: who comes back far away goes a part of the way at each step, and without the pull hardly any."""
    model, away = fl.ImageMLP(5, hidden=(), classes=3, reference=reference), 100.0
    shared = model.init(0)
    own = {f"params/{n}": torch.stack([x + away] * 2) for n, x in shared.items()}

    def left(mu: float) -> list[float]:
        work = fl.Train(
            model,
            optimizer=fl.ClientOptimizer("sgd", lr=0.1),
            gradient_steps=(fl.Proximal(mu),) if mu else (),
            personal=True,
        )
        _, kept = fold(work, job(shared, range(2)), [rows(t, range(2)) for t in range(3)], {**own, **_opt(work, own)})
        return [float((kept[f"params/{n}"] - x).abs().mean()) for n, x in shared.items()]

    assert left(0.0) == pytest.approx([away] * len(shared), rel=0.02)
    assert left(5.0) == pytest.approx([away / 2**3] * len(shared), rel=0.05)


def _opt(work: fl.Train, own: Any) -> Any:
    """What the optimizer of clients with these tensors begins with, as they keep it."""
    return trees.join("opt/", work.optimizer.init({n.removeprefix("params/"): x for n, x in own.items()}), {})


def test_a_client_that_failed_keeps_what_it_had_and_sends_zeros() -> None:
    model, shared = Softmax(), Softmax().init(0)
    work = fl.Train(model, gradient_steps=(Memory(),))
    _, own = fold(work, job(shared, range(3)), [rows(0, range(3))])
    bad = rows(1, range(3))
    bad["x_CBF"][1, 0, 0] = torch.inf
    message, later = fold(work, job(shared, range(3), version=1), [bad], own)
    clean, good = fold(work, job(shared, range(3), version=1), [rows(1, range(3))], own)
    assert message.metrics["failed"].tolist() == [0, 1, 0]
    assert all(not x[1].any() for x in message.tensors.values())
    for c in (0, 2):
        assert pack_message(take_client(message, c)) == pack_message(take_client(clean, c))
        assert all(torch.equal(later[n][c], good[n][c]) for n in good)
    assert all(torch.equal(later[n][1], own[n][1]) for n in own)
    _, first = fold(work, job(shared, range(3)), [bad])
    assert not first["step/memory/weight"][1].any()


@dataclass(frozen=True)
class Overflowing(Memory):
    """Its own tensor, and nothing else, stops being a number."""

    def final(self, state: Any, delta_C: Any, steps_C: Any) -> Any:
        sent, after = super().final(state, delta_C, steps_C)
        after["bias"][1] = torch.inf
        return sent, after


def test_a_client_whose_own_tensors_are_no_numbers_has_failed() -> None:
    work = fl.Train(Softmax(), gradient_steps=(Overflowing(),))
    message, own = fold(work, job(Softmax().init(0), range(3)), [rows(0, range(3))])
    assert message.metrics["failed"].tolist() == [0, 1, 0]
    assert all(not x[1].any() for x in message.tensors.values())
    assert not own["step/memory/bias"][1].any()


def test_names_of_private_state_are_the_same_in_rounds_that_take_turns() -> None:
    model = LoraLinear()
    work = fl.Train(model, gradient_steps=(Memory(),), freeze_schedule=(("lora_A",), ("lora_B",)))
    shared = {**model.init(0), "layer.lora_B": torch.full((4, 2), 0.1)}
    batch = rows(0, range(2), features=6, classes=4)
    one, own = fold(work, job(shared, range(2)), [batch])
    two, later = fold(work, job(shared, range(2), version=1), [batch], own)
    assert set(one.tensors) == {"layer.lora_B", "memory.layer.lora_B"}
    assert set(two.tensors) == {"layer.lora_A", "memory.layer.lora_A"}
    assert set(own) == set(later) == {"step/memory/layer.lora_A", "step/memory/layer.lora_B"}
    assert torch.equal(later["step/memory/layer.lora_B"], own["step/memory/layer.lora_B"])


def test_a_worker_of_diloco_keeps_its_steps_state_and_forgets_a_lost_round() -> None:
    model, shared = Softmax(), Softmax().init(0)
    batches = [rows(t, range(4)) for t in range(2)]
    worker = Worker(fl.Train(model, gradient_steps=(Memory(),)), drop=0.5)
    message, own = fold(worker, job(shared, range(4)), batches)
    lost = message.metrics["dropped"].bool()
    assert set(lost.tolist()) == {True, False}
    _, plain = fold(worker.inner, job(shared, range(4)), batches)
    for name, x in plain.items():
        assert torch.equal(own[name][~lost], x[~lost])
        assert not own[name][lost].any()
        assert not message.tensors[name.replace("step/memory/", "memory.")][lost].any()


def test_state_survives_a_kill_and_a_resume(tmp_path: Path) -> None:
    """Twice three rounds from a folder end in the bytes of six at once."""
    draw = torch.Generator().manual_seed(0)
    shards = [
        fl.ArrayShard(
            torch.randn(12, 5, generator=draw).numpy(), labels=torch.randint(0, 3, (12,), generator=draw).numpy()
        )
        for _ in range(4)
    ]
    model = fl.ImageMLP(5, hidden=(4,), classes=3)
    task = fl.ClientTask(
        work=fl.Train(model, gradient_steps=(fl.Clip(1.0), Memory())),
        source=fl.TrainSource(shards, batch_size=4, steps=2),
    )

    def rounds(store: fl.ClientStore, begin: int, end: int, shared: Any) -> Any:
        for version in range(begin, end):
            engine = fl.LocalEngine({"train": task}, store)
            asked = fl.Job(
                work="train", shared=Shared.of_flat(shared), version=version, clients=(0, 1, 2, 3), seed=version
            )
            total = fl.Mean().zero()
            for message in drain(engine, asked):
                total = fl.Mean().add(total, message)
            change, _ = closed(fl.Mean(), total, shared)
            shared, _ = updated(ServerSGD(), {n: x for n, x in change.items() if n in shared}, {}, shared)
        return shared

    whole = rounds(fl.ClientStore(tmp_path / "whole"), 0, 6, model.init(0))
    half = rounds(fl.ClientStore(tmp_path / "halves"), 0, 3, model.init(0))
    rounds(fl.ClientStore(tmp_path / "halves"), 3, 5, half)  # these two were lost
    assert trees.digest(rounds(fl.ClientStore(tmp_path / "halves"), 3, 6, half)) == trees.digest(whole)


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        (lambda: fl.Clip(0.0), "train.clip"),
        (lambda: fl.Proximal(-1.0), "train.prox"),
        (lambda: fl.WeightDecay(float("nan")), "train.weight_decay"),
        (lambda: fold(fl.Train(Softmax(), gradient_steps=(Memory(), Memory())), JOB, []), "two gradient steps keep"),
        (lambda: fold(fl.Train(Softmax(), gradient_steps=(Memory(),)), JOB, [], WRONG), "private state"),
    ],
)
def test_refuses(steps: Any, what: str) -> None:
    with pytest.raises(fl.LichenError, match=what):
        steps()


JOB = job(Softmax().init(0), range(2))
WRONG = {"step/memory/weight": torch.zeros(2, 9)}
