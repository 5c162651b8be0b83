"""Clients that ask back within a job: sums under masks, training split at a layer; who leaves costs nobody else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.collecting.admission import OPEN
from lichen.core.collecting.collect import Collected, collect, drain
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import Job, Message, pack_job, pack_message, take_client
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.core.wire.answer import answer_size, pack_answer, unpack_answer
from lichen.core.wire.blob import pack_blob
from lichen.core.wire.shared import Shared
from lichen.engines.answering import AnsweringEngine
from lichen.engines.around import AroundEngine
from lichen.engines.distributed import DistributedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.ranks import Ranks
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.engines.spawned import SpawnedEngine
from lichen.engines.turns import Answers
from support import toy_dialogues
from support.asking import all_of, hand
from support.forked_ranks import on_ranks
from support.toy_dialogues import (
    FEATURES,
    HIDDEN,
    WORKS,
    MaskedSum,
    SplitServer,
    SumServer,
    client_tasks,
    plain_sum,
    split_task,
    unsplit,
)

MESSAGE = Message(
    group="g", client_C=torch.tensor([1]), version_C=torch.tensor([0]), tensors={}, weight_C=torch.ones(1)
)
CLIENTS = (4, 0, 7, 2, 5)
MASKS = Job(work="masks", shared=Shared(), version=0, clients=CLIENTS, seed=11, settings={"clients": 5.0})
SPLIT = Job(
    work="split",
    shared=Shared({"lower": torch.randn(FEATURES, HIDDEN, generator=torch.Generator().manual_seed(1))}),
    version=0,
    clients=(0, 1, 2, 3),
    seed=11,
)


def local(folder: Path, block: int, work: MaskedSum | None = None, *, raises: bool = False) -> LocalEngine:
    return LocalEngine(client_tasks(work), ClientStore(folder), block_size=block, raises=raises)


class Backwards:
    """The replies of another engine, the last one first."""

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    def replies(self, numbers: Collection[int], until: float = float("inf")) -> Iterator[Reply]:
        yield from reversed(list(self.inner.replies(numbers, until)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def masked(engine: Engine, server: SumServer, **how: Any) -> tuple[Collected, list[Message]]:
    """A sum under masks: what was collected, and the messages that count."""
    messages: list[Message] = []
    answers = Answers(answer=server.answer, at_once=False, **how)
    asked = AnsweringEngine(engine, answers, WORKS)
    return collect(asked, [MASKS], admission=WORKS, seen=lambda m, _: messages.append(m)), messages


def by_client(messages: Sequence[Message]) -> dict[int, bytes]:
    return {int(m.client_C[c]): pack_message(take_client(m, c)) for m in messages for c in range(len(m.client_C))}


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [lambda engine: engine, Backwards])
def test_a_sum_under_masks_is_the_plain_sum_in_any_blocks_and_order(
    tmp_path: Path, around: Callable[[Engine], Engine]
) -> None:
    found = []
    for block in (1, 2, 5):
        engine, server = local(tmp_path / str(block), block), SumServer()
        came, messages = masked(around(engine), server)
        total = server.total(MASKS, messages)
        assert total.numpy().tobytes() == plain_sum(CLIENTS).numpy().tobytes()
        assert not any(torch.equal(x, plain_sum([client])) for client, x in server.masked.items())
        assert came.client_N.tolist() == sorted(CLIENTS)
        assert engine.store.load(CLIENTS, 1)["seen"].tolist() == [1.0] * 5
        found.append((by_client(messages), engine.bytes_up, engine.bytes_down))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("around", [lambda engine: engine, Backwards])
def test_training_split_at_a_layer_is_training(tmp_path: Path, around: Callable[[Engine], Engine]) -> None:
    found = []
    for block in (1, 3, 4):
        engine, server, messages = local(tmp_path / str(block), block), SplitServer(), list[Message]()
        answering = AnsweringEngine(around(engine), Answers(answer=server.answer), WORKS)
        collect(answering, [SPLIT], admission=WORKS, seen=lambda m, _, into=messages: into.append(m))
        for message in messages:
            for c, client in enumerate(message.client_C.tolist()):
                lower, upper = unsplit(split_task(4), SPLIT, client)
                assert torch.equal(message.tensors["lower"][c], lower)
                assert torch.equal(server.upper[client], upper)
        found.append((by_client(messages), engine.bytes_up, engine.bytes_down))
    assert len(found[0][0]) == 4
    assert found[0] == found[1] == found[2]


def test_ranks_sum_under_masks_together_and_split_each_its_own(tmp_path: Path) -> None:
    def program(ranks: Ranks) -> Any:
        engine, server = DistributedEngine(local(tmp_path / "ranks", 2), ranks), SumServer()
        came, messages = masked(engine, server)
        answering = AnsweringEngine(engine, Answers(answer=SplitServer().answer), WORKS)
        split = list[Message]()
        collect(answering, [SPLIT], admission=WORKS, seen=lambda m, _: split.append(m))
        lower = {str(c): m.tensors["lower"][k].tolist() for m in split for k, c in enumerate(m.client_C.tolist())}
        # Nobody left, so that each rank's own messages reveal as much as all of them.
        return [
            server.total(MASKS, messages).tolist(),
            came.client_N.tolist(),
            lower,
            engine.bytes_up,
            engine.bytes_down,
        ]

    one = program(Ranks())
    for size in (2, 3):
        answers = on_ranks(size, program)
        assert all("value" in answer for answer in answers), answers
        ranks = [answer["value"] for answer in answers]
        assert [rank[:2] for rank in ranks] == [[plain_sum(CLIENTS).tolist(), sorted(CLIENTS)]] * size
        assert {c: x for rank in ranks for c, x in rank[2].items()} == one[2]
        assert all(rank[3:] == one[3:] for rank in ranks)


# --- who leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("block", [1, 2, 5])
def test_who_fails_at_a_stage_is_named_and_the_others_have_their_bytes(tmp_path: Path, stage: int, block: int) -> None:
    server = SumServer()
    came, messages = masked(local(tmp_path, block, MaskedSum(fails={7: stage})), server)
    rest = sorted(set(CLIENTS) - {7})
    assert came.client_N.tolist() == rest
    assert [(r.client, r.reason, r.what) for r in came.attendance.named] == [(7, "error", "client 7 cannot go on")]
    counted = sorted(CLIENTS) if stage == 3 else rest
    assert server.total(MASKS, messages).tolist() == plain_sum(counted).tolist()
    alone, _ = SumServer(), None
    _, others = masked(local(tmp_path / "alone", 1, MaskedSum(fails={7: stage})), alone)
    assert by_client(messages) == by_client(others)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_who_is_not_heard_of_any_more_is_missing(tmp_path: Path, stage: int) -> None:
    count = 0

    def lose(reply: Reply, job: Job) -> list[Reply]:
        nonlocal count
        count += 2 in reply.clients
        return [] if 2 in reply.clients and count > stage else [reply]

    server = SumServer()
    came, messages = masked(AroundEngine(local(tmp_path, 1), on_reply=lose), server)
    assert came.attendance.missing == (2,)
    assert came.client_N.tolist() == sorted(set(CLIENTS) - {2})
    counted = CLIENTS if stage == 3 else set(CLIENTS) - {2}
    assert server.total(MASKS, messages).tolist() == plain_sum(counted).tolist()


def test_a_stage_ends_when_patience_does(tmp_path: Path) -> None:
    engine, times = local(tmp_path, 1), iter(range(10_000))
    engine.now = lambda: float(next(times))  # type: ignore[method-assign]
    server = SumServer()
    came, _ = masked(engine, server, patience=5.0)
    assert 0 < len(server.present[0]) < len(CLIENTS)
    assert server.present == [server.present[0]] * 3
    assert came.client_N.tolist() == list(server.present[0])
    assert set(came.attendance.missing) == set(CLIENTS) - set(server.present[0])


def test_a_block_without_memory_goes_on_in_halves(tmp_path: Path) -> None:
    server, plain = SumServer(), SumServer()
    _, messages = masked(local(tmp_path / "a", 5, MaskedSum(memory=2)), server)
    _, others = masked(local(tmp_path / "b", 1), plain)
    assert by_client(messages) == by_client(others)
    assert server.present == plain.present


# --- nonsense --------------------------------------------------------------------------------------------------------


def change(reply: Reply, **tensors: Any) -> Reply:
    assert reply.message is not None
    return replace(reply, message=replace(reply.message, tensors={**reply.message.tensors, **tensors}))


NONSENSE: dict[str, tuple[str, Callable[[Reply, int], list[Reply]]]] = {
    "another shape": ("shape", lambda reply, n: [change(reply, share_N=torch.ones(1, 2).long()) if n == 1 else reply]),
    "a name too many": ("names", lambda reply, n: [change(reply, x=torch.ones(1, 2)) if n == 2 else reply]),
    "the same stage again": ("turn", lambda reply, n: [reply, reply] if n == 1 else [reply]),
    "another client": (
        "uninvited",
        lambda reply, n: [replace(reply, message=replace(reply.message, client_C=torch.tensor([0])))],
    ),
    "one too many": ("turn", lambda reply, n: [replace(reply, question=True)]),
    "the end before its turn": ("turn", lambda reply, n: [replace(reply, question=n not in (1, 3))]),
    "the end beside a question": ("turn", lambda reply, n: [reply, replace(reply, question=False)]),
    "bytes that cannot be read": (
        "bytes",
        lambda reply, n: [replace(reply, message=None, error=LichenError("no"), reason="bytes") if n == 1 else reply],
    ),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_costs_its_client_the_round_and_nobody_else(tmp_path: Path, what: str) -> None:
    reason, lie = NONSENSE[what]
    count = -1

    def on_reply(reply: Reply, job: Job) -> list[Reply]:
        nonlocal count
        count += 4 in reply.clients
        return lie(reply, count) if 4 in reply.clients else [reply]

    server = SumServer()
    came, messages = masked(AroundEngine(local(tmp_path, 1), on_reply=on_reply), server)
    rest = sorted(set(CLIENTS) - {4})
    assert came.client_N.tolist() == rest
    assert {(r.client, r.reason) for r in came.attendance.named} == {(4, reason)}
    assert set(by_client(messages)) == set(rest)
    assert server.total(MASKS, messages).tolist() in (plain_sum(rest).tolist(), plain_sum(CLIENTS).tolist())


def test_one_of_a_block_whose_question_is_no_number_is_left_out(tmp_path: Path) -> None:
    def spoil(reply: Reply, job: Job) -> list[Reply]:
        if reply.question and reply.message is not None and 2 in reply.clients:
            h = reply.message.tensors["h_BH"].clone()
            h[reply.clients.index(2)] = torch.nan
            return [change(reply, h_BH=h)]
        return [reply]

    messages = list[Message]()
    engine = AroundEngine(local(tmp_path, 4), on_reply=spoil)
    answering = AnsweringEngine(engine, Answers(answer=SplitServer().answer), WORKS)
    came = collect(answering, [SPLIT], admission=WORKS, seen=lambda m, _: messages.append(m))
    assert [(r.client, r.reason) for r in came.attendance.named] == [(2, "finite")]
    assert came.client_N.tolist() == [0, 1, 3]
    for message in messages:
        for c, client in enumerate(message.client_C.tolist()):
            assert torch.equal(message.tensors["lower"][c], unsplit(split_task(4), SPLIT, client)[0])


@pytest.mark.parametrize("at_once", [True, False])
def test_an_answer_that_cannot_be_given_refuses_those_who_asked(tmp_path: Path, at_once: bool) -> None:
    def answer(question: Message, job: Job, stage: int) -> dict[str, torch.Tensor]:
        if 2 in question.client_C.tolist():
            raise LichenError("that is no key")
        return SplitServer(upper={}).answer(question, job, 0)

    answering = AnsweringEngine(local(tmp_path, 4), Answers(answer=answer, at_once=at_once), WORKS)
    came = collect(answering, [SPLIT], admission=WORKS)
    assert {(r.client, r.what) for r in came.attendance.named} == {
        (client, "that is no key") for client in ((2,) if at_once else SPLIT.clients)
    }


def test_where_nobody_answers_questions_are_refused(tmp_path: Path) -> None:
    came = collect(local(tmp_path, 2), [MASKS], admission=WORKS)
    assert came.attendance.refused == {"turn": 5}
    with pytest.raises(LichenError, match="nobody answers"):
        list(drain(local(tmp_path, 2), MASKS))
    with pytest.raises(LichenError, match="nobody answers"):
        list(serve(MASKS, client_tasks(), ClientStore(tmp_path)))
    answering = AnsweringEngine(local(tmp_path, 2), Answers(answer=SumServer().answer), OPEN)
    assert collect(answering, [MASKS]).attendance.refused == {"turn": 5}


# --- processes -------------------------------------------------------------------------------------------------------


def spawned(folder: Path, nodes: int = 2, **fails: int) -> SpawnedEngine:
    script = Path(toy_dialogues.__file__)
    return SpawnedEngine([sys.executable, str(script), str(folder), json.dumps(fails)], nodes=nodes)


def test_processes_ask_and_are_answered_with_the_same_bytes(tmp_path: Path) -> None:
    here, plain, messages, others = local(tmp_path / "a", 2), SumServer(), list[Message](), list[Message]()
    with spawned(tmp_path / "b") as there:
        server = SumServer()
        for _ in range(2):  # a second job goes over the same pipes
            _, found = masked(there, server)
            assert server.total(MASKS, found).tolist() == plain_sum(CLIENTS).tolist()
            _, known = masked(here, plain)
            assert by_client(found) == by_client(known)
            assert (there.bytes_up, there.bytes_down) == (here.bytes_up, here.bytes_down)
        for engine, into in ((here, messages), (there, others)):
            answering = AnsweringEngine(engine, Answers(answer=SplitServer().answer), WORKS)
            collect(answering, [SPLIT], admission=WORKS, seen=lambda m, _, into=into: into.append(m))
        assert by_client(messages) == by_client(others)
        assert len(by_client(others)) == 4
        assert (there.bytes_up, there.bytes_down) == (here.bytes_up, here.bytes_down)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_process_that_fails_or_ends_between_stages_costs_its_clients_the_round(tmp_path: Path, stage: int) -> None:
    with spawned(tmp_path, nodes=3, **{"7": stage}) as engine:  # clients 4 and 7 live in the second process
        server = SumServer()
        came, messages = masked(engine, server)
        assert [(r.client, r.reason, r.what) for r in came.attendance.named] == [(7, "error", "client 7 cannot go on")]
        counted = CLIENTS if stage == 3 else set(CLIENTS) - {7}
        assert server.total(MASKS, messages).tolist() == plain_sum(counted).tolist()
        asked = 0

        def kill(reply: Reply, job: Job) -> list[Reply]:
            nonlocal asked
            asked += reply.question
            if asked == 5 and stage == 0:  # all have asked once
                engine.nodes[2].process.kill()  # 2 and 5
            return [reply]

        if stage == 0:
            came, messages = masked(AroundEngine(engine, on_reply=kill), SumServer())
            assert came.client_N.tolist() == [0, 4]
            assert {r.client for r in came.attendance.named} == {2, 5, 7}
        came, messages = masked(engine, SumServer())
        assert came.client_N.tolist() == sorted(set(CLIENTS) - {7})


def test_a_process_whose_client_was_dismissed_does_the_next_job(tmp_path: Path) -> None:
    with spawned(tmp_path, nodes=1) as engine:
        came = collect(engine, [MASKS], admission=WORKS)
        assert came.attendance.refused == {"turn": 5}
        lied = AroundEngine(engine, on_reply=lambda reply, _: [change(reply, x=torch.ones(1))])
        assert masked(lied, SumServer())[0].attendance.refused == {"names": 5}
        server = SumServer()
        _, messages = masked(engine, server)
        assert server.total(MASKS, messages).tolist() == plain_sum(CLIENTS).tolist()


def test_a_node_refuses_answers_that_nobody_waits_for(tmp_path: Path) -> None:
    talks = Talks(client_tasks(), ClientStore(tmp_path))
    worker, kinds = SiteWorker(lambda rate: talks), list[list[bytes]]()
    thread = worker.start()
    for number, (kind, body) in enumerate(
        [
            (b"A", pack_answer(2, {})),
            (b"J", pack_job(replace(MASKS, clients=(4,)))),
            (b"A", pack_answer(1, {})),
            (b"A", pack_answer(2, {})[:-1]),
            (b"A", pack_answer(2, None)),
            (b"A", pack_answer(2, None)),
        ],
        start=1,
    ):
        hand(worker, number, (4,), kind, body)
        kinds += [[kind for kind, _ in got] for _, _, got in all_of(worker)]
    worker.close()
    thread.join()
    assert kinds == [[b"E"], [b"Q"], [b"E"], [b"E"], [b"."], [b"E"]]


def test_an_answers_bytes() -> None:
    answer = {"a": torch.randn(2, 3), "n": torch.tensor(4)}
    talk, back = unpack_answer(pack_answer(3, answer))
    assert talk == 3
    assert back is not None
    assert all(torch.equal(back[name], x) for name, x in answer.items())
    assert unpack_answer(pack_answer(1, None)) == (1, None)
    assert answer_size({name: x.expand(5, *x.shape) for name, x in answer.items()}) == len(pack_answer(3, answer))
    assert answer_size(None) == len(pack_answer(1, None))
    for wrong in (pack_message(MESSAGE), pack_answer(1, answer)[:-1], pack_blob("answer", {}, answer)):
        with pytest.raises(LichenError):
            unpack_answer(wrong)
