"""The laws of every transform: the client axis, what is declared, what arrives, and what the total half may do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.collecting.checks import declared_fault
from lichen.core.expected import Expected, MetricSpec, specs_of
from lichen.core.message import Job, Message, pack_message, take_client
from lichen.core.seeds import torch_generator
from lichen.core.store import load_tree, save_tree
from lichen.core.tree import Tree, digest
from lichen.core.wire.shared import Shared
from lichen.declared import Property
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.bounds.gate import NormGate
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transform, on_total
from lichen.transforms.uplink import Coded
from support.noise import Noise

FAMILY: dict[str, Transform] = {
    "clip": ClipChange(1.0),
    "private": ClipChange(1.0, private=True),
    "gate": NormGate(3.0),
    "coded": Coded(parse_codecs(["int8"])),
    "coded, sparse": Coded(parse_codecs(["topk:2/8", "int4"])),
    "coded, forgetful": Coded(parse_codecs(["sketch:2", "bf16"]), error_feedback=False),
    "noise": Noise(0.1),
}
member = pytest.mark.parametrize("transform", FAMILY.values(), ids=FAMILY)
CLIENTS = (0, 3, 4)
SHARED = Shared({"a": torch.zeros(6, 8), "b": torch.zeros(5), "scale": torch.zeros(())})
BEFORE = Expected(group="g", tensors=specs_of({**SHARED.trainable, "rows": torch.zeros(2, dtype=torch.int64)}))


def job(version: int) -> Job:
    return Job(work="w", shared=SHARED, version=version, clients=CLIENTS, seed=50 + version)


def drawn(version: int, clients: tuple[int, ...] = CLIENTS) -> Message:
    """A message whose client c has numbers of its own, in any company."""

    def one(client: int) -> Tree:
        draw = torch_generator(version, client)
        return {name: torch.randn(x.shape, generator=draw) for name, x in SHARED.trainable.items()}

    ids = torch.tensor(clients)
    return Message(
        group="g",
        client_C=ids,
        version_C=torch.full_like(ids, version),
        tensors={**trees.stack([one(client) for client in clients]), "rows": torch.stack([ids, ids + 1], 1)},
        weight_C=torch.ones(len(clients), dtype=torch.float64),
    )


def sent(transform: Transform, clients: tuple[int, ...], rounds: int = 3) -> tuple[list[Message], Tree]:
    """What these clients send in some rounds, and what they keep in the end."""
    out, own_C = list[Message](), Tree()
    for version in range(rounds):
        message, own_C = transform.on_client(drawn(version, clients), own_C, job(version), clients)
        out.append(message)
    return out, own_C


@member
def test_a_client_alone_and_beside_others_sends_and_keeps_the_same_bits(transform: Transform) -> None:
    together, own_C = sent(transform, CLIENTS)
    for place, client in enumerate(CLIENTS):
        alone, own_1 = sent(transform, (client,))
        assert [pack_message(m) for m in alone] == [pack_message(take_client(m, place)) for m in together]
        assert own_1.keys() == own_C.keys()
        assert all(torch.equal(x_1[0], own_C[name][place]) for name, x_1 in own_1.items())


@member
def test_what_it_keeps_at_its_clients_is_private_state_so_that_an_answer_may_be_lost(transform: Transform) -> None:
    _, own_C = sent(transform, CLIENTS, rounds=2)
    once = transform.on_client(drawn(2), dict(own_C), job(2), CLIENTS)
    transform.on_client(drawn(3), dict(once[1]), job(3), CLIENTS)  # an answer that did not count
    again = transform.on_client(drawn(2), dict(own_C), job(2), CLIENTS)
    assert pack_message(again[0]) == pack_message(once[0])
    assert digest(again[1]) == digest(once[1])
    assert Property.LOST_ANSWERS not in transform.lacks


@member
def test_what_is_sent_is_what_was_declared_and_what_arrives_is_what_was_there(transform: Transform) -> None:
    messages, _ = sent(transform, CLIENTS)
    for version, message in enumerate(messages):
        assert declared_fault(message, transform.declared(BEFORE)) is None
        arrived = transform.on_arrival(message, BEFORE, {})
        measured = {name: MetricSpec() for name in transform.measures}
        assert declared_fault(arrived, replace(BEFORE, metrics=measured)) is None
        assert torch.equal(arrived.tensors["rows"], drawn(version).tensors["rows"])
        assert torch.equal(arrived.client_C, message.client_C)
        assert pack_message(transform.on_arrival(message, BEFORE, {})) == pack_message(arrived)


@member
def test_no_half_changes_what_it_is_given(transform: Transform) -> None:
    message = drawn(0)
    before = pack_message(message)
    coded, _ = transform.on_client(message, {}, job(0), CLIENTS)
    coded_before = pack_message(coded)
    transform.on_arrival(coded, BEFORE, {})
    change = Shared(trees.take({n: message.tensors[n] for n in SHARED.trainable}, 0))
    change_before = digest(change.flat())
    arrived = dict(transform.on_arrival(coded, BEFORE, {}).metrics)
    _, _, state = transform.on_total(change, {}, arrived, clients=3, seed=1)
    state_before = digest(state)
    transform.on_total(change, state, arrived, clients=3, seed=2)
    assert pack_message(message) == before
    assert pack_message(coded) == coded_before
    assert (digest(change.flat()), digest(state)) == (change_before, state_before)


@member
def test_a_total_half_keeps_what_the_change_is_and_remembers_by_its_state_alone(
    transform: Transform, tmp_path: Path
) -> None:
    here, there = Tree(), Tree()
    for version in range(4):
        tensors = {name: x_C[0] for name, x_C in drawn(version).tensors.items() if name in SHARED.trainable}
        change = Shared(tensors, patch={"layer.dense": torch.ones(2, 2)})
        arrived = {name: torch.arange(3.0).double() + version for name in transform.measures}
        one, told, here = transform.on_total(change, here, arrived, clients=3, seed=version)
        other, again, there = transform.on_total(change, there, arrived, clients=3, seed=version)
        assert specs_of(one.flat()) == specs_of(change.flat())
        assert digest(one.flat()) == digest(other.flat())
        assert told == again
        assert all(isinstance(value, float) for value in told.values())
        save_tree(tmp_path / "state", there, {})
        there = load_tree(tmp_path / "state")[0]
        assert digest(here) == digest(there)


def test_total_halves_stand_in_a_row_each_with_its_own_state() -> None:
    change = Shared({"a": torch.zeros(4)})
    row = (replace(Noise(0.1), name="near"), ClipChange(1.0), replace(Noise(0.2), name="far"))
    state, seen = Tree(), Shared()
    for seed in range(3):
        seen, told, state = on_total(row, change, state, {}, clients=1, seed=seed)
        assert told == {"noise.rounds": seed + 1.0}
    assert {name: int(x) for name, x in state.items()} == {"near/rounds": 3, "far/rounds": 3}
    alone, _, _ = on_total(row[2:], change, {}, {}, clients=1, seed=2)
    both, _, _ = on_total(row[:1], alone, {}, {}, clients=1, seed=2)
    assert torch.equal(seen.trainable["a"], both.trainable["a"])
    assert not torch.equal(seen.trainable["a"], alone.trainable["a"])
    assert on_total((), change, state, {}, clients=1, seed=2) == (change, {}, {})
