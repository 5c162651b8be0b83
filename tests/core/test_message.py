"""Jobs and messages survive the wire, and damage is told in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lichen.core.errors import LichenError
from lichen.core.message import (
    Job,
    Message,
    concatenate_messages,
    link,
    pack_job,
    pack_message,
    size,
    take_client,
    unpack_job,
    unpack_message,
)
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
ARRAYS = hnp.arrays("float32", hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32))
TREES = st.dictionaries(NAMES, ARRAYS.map(torch.from_numpy), max_size=4)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    count = draw(st.integers(1, 4))
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    shape = draw(hnp.array_shapes(max_dims=2, max_side=3))
    return Message(
        group=draw(st.text(max_size=8)),
        client_C=torch.tensor(draw(st.lists(st.integers(0, 2**62), min_size=count, max_size=count))),
        version_C=torch.zeros(count, dtype=torch.int64),
        tensors={n: torch.randn(count, *shape) for n in names},
        weight_C=torch.rand(count, dtype=torch.float64),
        metrics={"loss_sum": torch.rand(count, dtype=torch.float64)},
        texts=tuple((draw(st.text(max_size=5)),) for _ in range(count)),
    )


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].nan_to_num(), b[k].nan_to_num()) for k in a
    )


@given(TREES, st.integers(0, 2**62), st.lists(st.integers(0, 2**40), max_size=3), st.lists(st.text(), max_size=3))
def test_job_round_trip(shared: Tree, seed: int, clients: int, texts: Sequence[str]) -> None:
    job = Job(
        work="train",
        shared=Shared.of_flat(shared),
        version=3,
        clients=tuple(clients),
        seed=seed,
        settings={"lr_scale": 0.1, "b": 2.0},
        texts=tuple(texts),
    )
    back = unpack_job(pack_job(job))
    assert same(back.shared.flat(), job.shared.flat())
    assert (back.work, back.version, back.clients, back.seed) == (job.work, job.version, job.clients, job.seed)
    assert (dict(back.settings), back.texts) == (dict(job.settings), job.texts)


@given(messages())
def test_message_round_trip_repeats_and_stacks(message: Message) -> None:
    data = pack_message(message)
    assert data == pack_message(message)
    back = unpack_message(data)
    assert same(back.tensors, message.tensors)
    assert torch.equal(back.client_C, message.client_C)
    assert back.texts == message.texts
    again = concatenate_messages([take_client(message, c) for c in range(message.client_C.shape[0])])
    assert pack_message(again) == data


@given(messages(), st.data())
def test_damage_is_one_error(message: Message, data: Any) -> None:
    raw = pack_message(message)
    cut = data.draw(st.integers(0, len(raw) - 1))
    with pytest.raises(LichenError):
        unpack_message(raw[:cut])
    with pytest.raises(LichenError):
        unpack_job(raw)


def test_every_client_of_a_group_sends_equally_many_bytes() -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(3, 2, 2)}
    clients = torch.tensor([1, 77, 10**9])
    stacked = Message(group="g", client_C=clients, version_C=clients, tensors=tensors, weight_C=clients.double())
    assert {len(pack_message(take_client(stacked, c))) for c in range(3)} == {size(stacked)}


INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
DTYPES = st.sampled_from((*INTEGERS, *FLOATS))
SHAPES = st.lists(st.integers(0, 120), max_size=3).filter(lambda shape: len(shape) < 3 or max(shape) < 30)


@given(st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), max_size=6), st.data())
def test_bytes_are_counted_as_they_are_packed(about: Any, data: Any) -> None:
    count = data.draw(st.integers(1, 3))
    text = st.text(max_size=6)
    message = Message(
        group=data.draw(text),
        client_C=torch.arange(count),
        version_C=torch.zeros(count, dtype=torch.int64),
        tensors={name: torch.zeros(count, *shape, dtype=dtype) for name, (dtype, shape) in about.items()},
        weight_C=torch.ones(count, dtype=torch.float64),
        metrics={name: torch.ones(count, 2, dtype=torch.float64) for name in data.draw(st.sets(NAMES, max_size=3))},
        texts=tuple(tuple(data.draw(st.lists(text, max_size=2))) for _ in range(count))
        if data.draw(st.booleans())
        else (),
    )
    assert size(message) == len(pack_message(take_client(message, 0)))
    job = Job(
        work=data.draw(text),
        shared=Shared.of_flat({name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in about.items()}),
        version=3,
        clients=tuple(range(count)),
        seed=2**60,
        settings=dict.fromkeys(data.draw(st.sets(text, max_size=3)), 0.5),
        texts=tuple(data.draw(st.lists(text, max_size=2))),
    )
    assert size(job) == len(pack_job(replace(job, clients=(5,))))


def test_groups_do_not_mix() -> None:
    one = Message(group="g", client_C=torch.zeros(1), version_C=torch.zeros(1), tensors={}, weight_C=torch.ones(1))
    other = Message(group="h", client_C=torch.zeros(1), version_C=torch.zeros(1), tensors={}, weight_C=torch.ones(1))
    with pytest.raises(LichenError, match="does not stack"):
        concatenate_messages([one, other])


def test_a_message_of_one_tensor_has_a_small_head() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    message = Message(
        group="smollm2-135m r8 q_proj v_proj",
        client_C=torch.tensor([3]),
        version_C=torch.tensor([7]),
        tensors={"wire.0123abcd": torch.zeros(1, 18_000, dtype=torch.uint8)},
        weight_C=zero,
        metrics=dict.fromkeys(("loss_sum", "count", "tokens", "steps", "failed"), zero),
    )
    assert len(pack_message(message)) - 18_000 <= 400 + 64  # eight numbers are content
    assert unpack_message(pack_message(message)).metrics.keys() == message.metrics.keys()


STEPS = (("aa", {"wire": torch.zeros(30, dtype=torch.uint8)}), ("bb", {"whole.w": torch.ones(2)}), ("cc", {}))


@given(st.sampled_from([None, "aa", "bb", "cc", "dd", "zz"]), st.integers(1, 3))
def test_a_client_is_sent_what_it_lacks(held: Any, clients: int) -> None:
    job = Job(work="t", shared=Shared({"w": torch.ones(50)}), version=1, clients=tuple(range(clients)), seed=1)
    job = replace(job, snapshot="dd", deltas=STEPS, acked={} if held is None else dict.fromkeys(range(clients), held))
    how = {"aa": "step", "bb": "step", "cc": "step", "dd": "same"}.get(held, "full")
    assert link(job) == how
    back = unpack_job(pack_job(job))
    assert (link(back), back.snapshot, back.clients) == (how, "dd", job.clients)
    assert same(back.shared.flat(), job.shared.flat() if how == "full" else {})
    if how == "step":
        wanted = STEPS[["aa", "bb", "cc"].index(held) :]
        assert back.deltas[0][0] == held
        assert len(back.deltas) == len(wanted)
        assert all(same(a, b) for (_, a), (_, b) in zip(back.deltas, wanted, strict=True))
    assert size(job) == len(pack_job(replace(job, clients=(0,))))
    if clients > 1 and how != "full":
        assert link(replace(job, acked={0: held})) == "full"  # they differ, so one blob serves all
