"""Liars: who they are, what each sends by a plain loop, and that nobody else is touched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.clients.attack.kinds import ATTACKS
from lichen.clients.attack.liars import liars
from lichen.clients.attack.lying import Lying
from lichen.clients.attack.messages import Weight
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import drain
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, concatenate_messages, pack_message, take_client
from lichen.core.replies import Reply
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree
from lichen.recipes.assemble.column import admission_of
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.sides.attack import liars_of
from lichen.recipes.schema.attack import AttackConfig
from support.small_experiment import engine, experiment

MADE = experiment()
JOB = Job(work="train lr=0.1", shared=MADE.start, version=0, clients=(0, 1, 2, 3), seed=5)


def attacked(**attack: Any) -> Experiment:
    recipe = MADE.recipe.model_copy(update={"attack": AttackConfig(**attack)})
    return MADE.with_server(recipe=recipe)


def sent(made: Experiment, folder: Path, block: int = 4) -> Message:
    return concatenate_messages(list(drain(engine(made, folder, block=block), JOB)))


def one(message: Message, client: int) -> Message:
    return take_client(message, message.client_C.tolist().index(client))


def test_liars_are_drawn_by_the_seed_and_somebody_is_honest() -> None:
    for count in range(1, 9):
        assert len(set(liars(count, 9, 3))) == count
        assert set(liars(count, 9, 3)) <= set(range(9))
    assert {liars(2, 9, seed) for seed in range(40)} > {liars(2, 9, 0)}
    for count in (0, 4, 5):
        with pytest.raises(LichenError, match="honest") as caught:
            liars(count, 4, 0)
        assert caught.value.where == "attack.liars"


def by_hand(kind: str, scale: float, delta: Tree, client: int) -> Tree:
    """Number by number."""
    flat = [float(v) for name in sorted(delta) for v in delta[name].flatten()]
    norm, generator = math.sqrt(sum(v * v for v in flat)), torch_generator(JOB.seed, client, "lie")
    drawn = {name: torch.randn(delta[name].shape, generator=generator) for name in sorted(delta)}
    out = {}
    for name, x in delta.items():
        values = []
        for v, z in zip(x.flatten().tolist(), drawn[name].flatten().tolist(), strict=True):
            if kind == "sign_flip":
                values.append(-scale * v)
            elif kind == "noise":
                values.append(v + scale * norm / math.sqrt(len(flat)) * z)
            else:
                values.append(scale / math.sqrt(len(flat)) * z if scale else 0.0)
        out[name] = torch.tensor(values).view(x.shape)
    return out


@pytest.mark.parametrize(
    ("kind", "scale"), [("sign_flip", 1.0), ("sign_flip", 2.5), ("noise", 0.7), ("free_ride", 0.0), ("free_ride", 0.1)]
)
def test_a_lie_is_the_papers_and_honest_bytes_stay(tmp_path: Path, kind: str, scale: float) -> None:
    made = attacked(kind=kind, scale=scale, liars=2)
    honest, message = sent(MADE, tmp_path / "honest"), sent(made, tmp_path / "lies")
    lying = liars_of(made.server)
    for client in JOB.clients:
        true, came = one(honest, client), one(message, client)
        if client not in lying:
            assert pack_message(came) == pack_message(true)
            continue
        wanted = by_hand(kind, scale, {name: x[0] for name, x in true.tensors.items()}, client)
        for name, x in came.tensors.items():
            torch.testing.assert_close(x[0], wanted[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(came.weight_C, true.weight_C)
        assert came.metrics.keys() == true.metrics.keys()
    assert torch.equal(honest.weight_C, message.weight_C)


@pytest.mark.parametrize("kind", ["sign_flip", "noise", "free_ride"])
def test_a_lie_has_the_same_bytes_in_any_block_and_every_round_its_own(tmp_path: Path, kind: str) -> None:
    made = attacked(kind=kind, scale=0.5, liars=2)
    first = sent(made, tmp_path / "4")
    for block in (1, 3):
        other = sent(made, tmp_path / str(block), block=block)
        assert {pack_message(one(first, c)) for c in JOB.clients} == {pack_message(one(other, c)) for c in JOB.clients}


def test_noise_is_new_in_each_round_and_for_each_client(tmp_path: Path) -> None:
    made = attacked(kind="free_ride", scale=1.0, liars=2)
    a, b = liars_of(made.server)
    now = sent(made, tmp_path / "now")
    later = concatenate_messages(list(drain(engine(made, tmp_path / "later"), replace(JOB, seed=6))))
    name = min(now.tensors)
    drawn = [one(now, a).tensors[name], one(now, b).tensors[name], one(later, a).tensors[name]]
    assert not any(torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    norm = math.sqrt(sum(float(x[0].square().sum()) for x in one(now, a).tensors.values()))
    assert norm == pytest.approx(1.0, rel=0.5)


class Weighing:
    """A work whose clients weigh 10 each, 100 at most."""

    def expected(self, job: Job) -> Any:
        from lichen.core.expected import Expected, TensorSpec

        return Expected(group="", tensors={"w": TensorSpec((2,))}, weight=(0.0, 100.0))

    def init(self, job: Job, clients: Any, own_C: Any) -> Any:
        return job, clients

    def step(self, state: Any, batch: Any) -> Any:
        return state

    def final(self, state: Any) -> tuple[Message, None]:
        job, clients = state
        ids = torch.tensor(clients)
        weight_C = torch.where(ids == 3, 0.0, 10.0).double()
        version_C = torch.full_like(ids, job.version)
        tensors = {"w": torch.ones(len(clients), 2)}
        return Message(group="", client_C=ids, version_C=version_C, weight_C=weight_C, tensors=tensors), None


@pytest.mark.parametrize(
    ("scale", "most", "weights"),
    [(3.0, {}, [30.0, 10.0, 30.0, 0.0]), (30.0, {}, [100.0, 10.0, 100.0, 0.0]), (30.0, {2: 55.0}, [100, 10, 55, 0])],
)
def test_a_weight_rises_as_far_as_the_work_and_the_roster_let_it(
    scale: float, most: dict[int, float], weights: list[float]
) -> None:
    work = Lying(Weighing(), Weight(scale, most), frozenset({0, 2, 3}))
    message, _ = work.final(work.init(JOB, (0, 1, 2, 3), None))
    assert message.weight_C.tolist() == weights
    assert torch.equal(message.tensors["w"], torch.ones(4, 2))


@pytest.mark.parametrize("kind", ["sign_flip", "noise", "free_ride"])
def test_admission_lets_a_lie_pass_and_refuses_a_weight_beyond_the_roster(tmp_path: Path, kind: str) -> None:
    made = attacked(kind=kind, liars=2)
    admission: Admission = admission_of(made.server)
    message, counted = sent(made, tmp_path), set[int]()
    reply = Reply(job=1, clients=tuple(message.client_C.tolist()), message=message)
    expected = admission.expected(JOB)
    arrived, refusals = admission.admit(reply, JOB, expected, counted)
    assert arrived is not None
    assert (counted, refusals) == ({0, 1, 2, 3}, [])
    heavy = replace(reply, message=replace(message, weight_C=message.weight_C * np.array([1.0, 10.0, 1.0, 1.0])))
    _, refusals = admission.admit(heavy, JOB, expected, set())
    assert [(refusal.client, refusal.reason) for refusal in refusals] == [(int(message.client_C[1]), "weight")]


def test_every_kind_of_a_recipe_says_what_it_changes() -> None:
    assert {kind.on for kind in ATTACKS.values()} <= {"message", "round", "rows"}
    assert all(name == kind.name and kind.summary for name, kind in ATTACKS.items())
