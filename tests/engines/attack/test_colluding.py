"""Liars that know all honest messages: what goes through the engine, in any order and in any blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lichen.clients.attack.collusion import InnerProduct, MinMax
from lichen.core.collecting.collect import drain
from lichen.core.message import Job, Message, concatenate_messages, pack_message, take_client
from lichen.engines.attack.colluding import ColludingEngine
from lichen.engines.clock import ClockEngine, Delays
from support.small_experiment import engine, experiment

MADE = experiment()
JOB = Job(work="train lr=0.1", shared=MADE.start, version=0, clients=(0, 1, 2, 3), seed=5)
LIARS = (1, 3)


def colluding(folder: Path, block: int = 4, liars: Sequence[int] = LIARS) -> ColludingEngine:
    inner = engine(MADE, folder, block=block)
    return ColludingEngine(inner, MinMax(), liars, attacked=lambda job: job.work.startswith("train "))


def by_client(messages: Sequence[Message]) -> dict[int, Message]:
    whole = concatenate_messages(messages)
    return {client: take_client(whole, c) for c, client in enumerate(whole.client_C.tolist())}


def test_liars_send_one_lie_made_of_the_honest_and_nobody_else_is_touched(tmp_path: Path) -> None:
    honest = by_client(list(drain(engine(MADE, tmp_path / "honest"), JOB)))
    there = colluding(tmp_path / "lies")
    came = by_client(list(drain(there, JOB)))
    assert pack_message(came[0]) == pack_message(honest[0])
    assert pack_message(came[2]) == pack_message(honest[2])
    stacked = {name: torch.cat([honest[0].tensors[name], honest[2].tensors[name]]) for name in honest[0].tensors}
    lie = MinMax().crafted(stacked, 2)
    for liar in LIARS:
        assert all(torch.equal(x[0], lie[name]) for name, x in came[liar].tensors.items())
        assert pack_message(replace(came[liar], tensors=honest[liar].tensors)) == pack_message(honest[liar])
    plain = engine(MADE, tmp_path / "plain")
    list(drain(plain, JOB))
    assert (there.bytes_up, there.bytes_down) == (plain.bytes_up, plain.bytes_down)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_lie_has_the_same_bytes_in_any_blocks(tmp_path: Path, block: int) -> None:
    whole = by_client(list(drain(colluding(tmp_path / "4"), JOB)))
    some = by_client(list(drain(colluding(tmp_path / str(block), block), JOB)))
    assert {c: pack_message(m) for c, m in whole.items()} == {c: pack_message(m) for c, m in some.items()}


def test_nothing_is_handed_on_before_all_have_answered_and_whoever_stops_listening_hears_the_rest(
    tmp_path: Path,
) -> None:
    there = colluding(tmp_path, block=1)
    number = there.submit(JOB)
    first = next(iter(there.replies((number,))))
    assert there.bytes_up == 4 * _bytes(first.message)
    rest = list(there.replies((number,)))
    assert sorted(reply.clients for reply in (first, *rest)) == [(c,) for c in JOB.clients]
    assert list(there.replies((number,))) == []


def _bytes(message: Message | None) -> int:
    from lichen.core.message import size

    assert message is not None
    return size(message)


def test_other_jobs_pass_and_a_cancelled_one_is_forgotten(tmp_path: Path) -> None:
    there = colluding(tmp_path, block=1)
    train = there.submit(JOB)
    judged = there.submit(replace(JOB, work="valid"))
    mixed = [reply.job for reply in there.replies((train, judged))]
    assert sorted(mixed) == [train] * 4 + [judged] * 4
    again = there.submit(replace(JOB, version=1))
    there.cancel(again)
    assert list(there.replies((again,))) == []


@pytest.mark.parametrize("clients", [(0, 2), (1, 3), (1,)])
def test_without_an_honest_client_or_a_liar_all_stay_as_they_are(tmp_path: Path, clients: tuple[int, ...]) -> None:
    job = replace(JOB, clients=clients)
    plain = by_client(list(drain(engine(MADE, tmp_path / "plain"), job)))
    came = by_client(list(drain(colluding(tmp_path / "lies"), job)))
    assert {c: pack_message(m) for c, m in plain.items()} == {c: pack_message(m) for c, m in came.items()}


def test_who_failed_is_not_listened_to(tmp_path: Path) -> None:
    broken = experiment(broken=(0, 1))
    inner = engine(broken, tmp_path / "lies")
    came = by_client(list(drain(ColludingEngine(inner, InnerProduct(1.0), LIARS), JOB)))
    honest = by_client(list(drain(engine(broken, tmp_path / "honest"), JOB)))
    assert all(torch.equal(x, -honest[2].tensors[name]) for name, x in came[3].tensors.items())
    assert pack_message(came[1]) == pack_message(honest[1])
    assert float(came[1].weight_C) == 0


def test_a_clock_around_it_lets_them_arrive_one_by_one(tmp_path: Path) -> None:
    there = ClockEngine(colluding(tmp_path / "clock"), Delays(median=10, sigma=1))
    number = there.submit(JOB)
    replies = list(there.replies((number,), until=math.inf))
    assert sorted(reply.clients for reply in replies) == [(c,) for c in JOB.clients]
    whole = by_client(list(drain(colluding(tmp_path / "plain"), JOB)))
    for reply in replies:
        assert reply.message is not None
        assert pack_message(reply.message) == pack_message(whole[reply.clients[0]])
