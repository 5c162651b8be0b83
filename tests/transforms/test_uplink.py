"""Coded messages of any work: the same bytes in any company, and a memory that loses nothing for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import FAILED, Expected, TensorSpec, specs_of
from lichen.core.message import Job, Message, concatenate_messages, pack_message, size, take_client
from lichen.core.seeds import torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Property
from lichen.server.mean import Mean
from lichen.transforms.bounds.clip_change import ClipChange
from lichen.transforms.delta import encode_delta
from lichen.transforms.layout import Layout
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transformed
from lichen.transforms.uplink import WIRE, Coded
from support.scripted_engine import ScriptedEngine

SHARED = {"l.lora_A": torch.zeros(4, 30), "l.lora_B": torch.zeros(20, 4), "bias": torch.zeros(7)}
CHAIN = parse_codecs(["topk:2/32", "int4~"])


@dataclass(frozen=True)
class Drawn:
    """A work whose changes are drawn by (version, client); client 9 fails in version 2, client 8 has weight 0."""

    frozen: tuple[str, ...] = ()

    def expected(self, job: Job) -> Expected:
        sent = specs_of({n: x for n, x in SHARED.items() if n not in (self.frozen if job.version % 2 else ())})
        rows = {"rows": TensorSpec((1,), torch.int64)}
        return Expected(group="g", tensors={**sent, **rows}, metrics={"failed": FAILED}, weight=(0.0, 1.0))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        return job, tuple(clients), own_C

    def step(self, state: Any, batch: Batch) -> Any:
        return state

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        job, clients, own_C = state
        names = [n for n in SHARED if n not in (self.frozen if job.version % 2 else ())]

        def drawn(client: int) -> Tree:
            generator = torch_generator(job.version, client)
            return {n: torch.randn(SHARED[n].shape, generator=generator) for n in names}

        failed = torch.tensor([float(c == 9 and job.version == 2) for c in clients]).double()
        tensors = trees.stack([drawn(c) for c in clients])
        tensors = {n: x * (1 - failed).view(-1, *[1] * (x.dim() - 1)).float() for n, x in tensors.items()}
        message = Message(
            group="g",
            client_C=torch.tensor(clients),
            version_C=torch.full((len(clients),), job.version),
            tensors={**tensors, "rows": torch.tensor(clients).view(-1, 1)},
            weight_C=torch.tensor([float(c != 8) for c in clients]).double() * (1 - failed),
            metrics={"failed": failed},
        )
        seen = torch.zeros(len(clients)) if own_C is None else own_C["seen"]
        return message, {"seen": seen + 1}


def go(work: Transformed, clients: tuple[int, ...], version: int, store: ClientStore) -> Message:
    """What :func:`lichen.core.fold.serve` does, for one block."""
    job = Job(work="w", shared=Shared.of_flat(SHARED), version=version, clients=clients, seed=100 + version)
    message, own_C = work.final(work.init(job, clients, store.load(clients, version)))
    assert own_C is not None
    store.stage(clients, version + 1, own_C)
    return message


def meant(client: int, version: int) -> torch.Tensor:
    return Layout.of(SHARED).flatten(
        {n: x for n, x in Drawn().final((_job(version), (client,), None))[0].tensors.items() if n in SHARED}
    )[0]


def _job(version: int) -> Job:
    return Job(work="w", shared=Shared.of_flat(SHARED), version=version, clients=(), seed=0)


def test_any_company_gives_a_clients_bytes_and_memory(tmp_path: Path) -> None:
    work = Transformed(Drawn(), (Coded(parse_codecs(["topk:2/32", "int4"])),))
    together, alone = ClientStore(tmp_path / "together"), ClientStore(tmp_path / "alone")
    for version in range(3):
        message = go(work, (0, 5, 9), version, together)
        for c, client in enumerate((0, 5, 9)):
            one = go(work, (client,), version, alone)
            assert pack_message(one) == pack_message(take_client(message, c))
            assert len(pack_message(one)) == size(message)
    own = [store.load((0, 5, 9), 3) for store in (together, alone)]
    assert own[0] is not None
    assert own[1] is not None
    assert {n for n in own[0] if n.startswith("wire/")} == {f"wire/{n}" for n in SHARED}
    assert all(torch.equal(own[0][n], own[1][n]) for n in own[0])
    assert own[0]["seen"].tolist() == [3, 3, 3]


@pytest.mark.parametrize("words", [["topk:2/32", "int4~"], ["sign"], ["int2~"]])
def test_what_arrived_follows_what_was_meant(tmp_path: Path, words: list[str]) -> None:
    chain, layout, store = parse_codecs(words), Layout.of(SHARED), ClientStore(tmp_path)
    work, without = Transformed(Drawn(), (Coded(chain),)), Transformed(Drawn(), (Coded(chain, error_feedback=False),))
    arrived, blind, wanted = (torch.zeros(layout.size) for _ in range(3))
    far, norms = [], []
    for version in range(40):
        wire = go(work, (3,), version, store).tensors[WIRE + layout.digest]
        arrived += chain.decode(wire, layout)[0]
        wanted += meant(3, version)
        message, own = without.final(without.init(_job(version), (3,), None))
        assert own is not None
        assert own.keys() == {"seen"}
        blind += chain.decode(message.tensors[WIRE + layout.digest], layout)[0]
        far.append(float((wanted - arrived).norm()))
        norms.append(float(meant(3, version).norm()))
    own = store.load((3,), 40)
    assert own is not None
    lost = layout.flatten({n: own[f"wire/{n}"] for n in SHARED})[0]
    assert torch.allclose(wanted - arrived, lost, atol=1e-4)
    # A memory of bounded size: about twice the changes that the code's share lets through per round.
    assert max(far[20:]) < 1.3 * max(far[10:20])
    assert max(far) < 32 / 2 * 2 * max(norms)
    if words[0].startswith("topk"):
        assert far[-1] < float((wanted - blind).norm())


def test_who_fails_or_does_not_count_keeps_the_memory(tmp_path: Path) -> None:
    work, store = Transformed(Drawn(), (Coded(CHAIN),)), ClientStore(tmp_path)
    for version in range(3):
        go(work, (8, 9), version, store)
    two, three = store.load((8, 9), 2), store.load((8, 9), 3)
    assert two is not None
    assert three is not None
    for name in SHARED:
        assert torch.equal(two[f"wire/{name}"][1], three[f"wire/{name}"][1])  # 9 failed in version 2
        assert two[f"wire/{name}"][1].any()
        assert not three[f"wire/{name}"][0].any()  # 8 never counted


def test_a_repeated_round_repeats_its_bytes(tmp_path: Path) -> None:
    work, store = Transformed(Drawn(), (Coded(CHAIN),)), ClientStore(tmp_path)
    first = [pack_message(go(work, (1, 2), version, store)) for version in range(3)]
    again = pack_message(go(work, (1, 2), 2, store))
    assert again == first[2] != first[1]


def test_rounding_errors_differ_from_round_to_round_and_average_out(tmp_path: Path) -> None:
    """One change, sent in many rounds: with the same rounding in each, the mean would keep its error."""
    chain, start = parse_codecs(["int4"]), Shared.of_flat(SHARED)
    works: list[Any] = [Transformed(Drawn(), (Coded(chain, error_feedback=False),)), Drawn()]

    def sent(work: Any, seed: int) -> Message:
        job = Job(work="w", shared=start, version=0, clients=(1,), seed=seed)
        message: Message = work.final(work.init(job, (1,), None))[0]
        return message

    layout, rounds = Layout.of(SHARED), 64
    (wanted,) = layout.flatten({n: x for n, x in sent(works[1], 0).tensors.items() if n in SHARED})
    rows_RB = torch.cat([sent(works[0], seed).tensors[WIRE + layout.digest] for seed in range(rounds)])
    assert len({tuple(row) for row in rows_RB.tolist()}) == rounds
    lost_RN = chain.decode(rows_RB, layout) - wanted
    assert float(lost_RN.mean(0).norm()) < 2 * float(lost_RN[0].norm()) / rounds**0.5
    steps = [encode_delta(start | Shared({"bias": torch.arange(7) / 9}), start, chain, seed) for seed in range(8)]
    assert len({tuple(step["wire"].tolist()) for step in steps}) > 1


def test_names_that_take_turns_share_a_memory_and_stand_pair_of(tmp_path: Path) -> None:
    work, store = Transformed(Drawn(frozen=("l.lora_A",)), (Coded(CHAIN),)), ClientStore(tmp_path)
    go(work, (1,), 0, store)
    go(work, (2,), 1, store)
    before = store.load((1,), 1)
    message = go(work, (1, 2), 3, store)  # version 3 freezes lora_A
    after = store.load((1,), 4)
    assert before is not None
    assert after is not None
    assert torch.equal(before["wire/l.lora_A"], after["wire/l.lora_A"])
    assert not torch.equal(before["wire/bias"], after["wire/bias"])
    assert WIRE + Layout.of({n: x for n, x in SHARED.items() if n != "l.lora_A"}).digest in message.tensors
    assert work.received(message, _job(3)).tensors.keys() == {"l.lora_B", "bias", "rows"}


def test_messages_are_decoded_as_they_arrive_alone_and_stacked(tmp_path: Path) -> None:
    work, store = Transformed(Drawn(), (Coded(CHAIN),)), ClientStore(tmp_path)
    messages = [go(work, (c,), 0, store) for c in (4, 5, 6)]
    together = work.received(concatenate_messages(messages), _job(0))
    for c, message in enumerate(messages):
        alone = work.received(message, _job(0))
        assert pack_message(alone) == pack_message(take_client(together, c))
        assert alone.tensors.keys() == {*SHARED, "rows"}
        assert alone.tensors["rows"].item() == 4 + c


def test_a_row_of_another_code_costs_its_client_the_round(tmp_path: Path) -> None:
    works = {words: Transformed(Drawn(), (Coded(parse_codecs([words])),)) for words in ("int8", "int4")}
    honest = Transformed(Drawn(), (Coded(CHAIN),))
    store, job = ClientStore(tmp_path), replace(_job(0), clients=(4, 5, 6))
    messages = [go(honest, (c,), 0, store) for c in (4, 6)]
    other = go(works["int8"], (5,), 0, ClientStore(tmp_path / "other"))
    engine = ScriptedEngine(lambda _: [((int(m.client_C[0]),), m) for m in (*messages, other)])
    came = collect(engine, [job], Mean(), admission=Admission(works={"w": honest}))
    assert came.client_N.tolist() == [4, 6]
    assert dict(came.attendance.refused) == {"shape": 1}
    with pytest.raises(LichenError, match="not a row of layout"):
        honest.received(replace(messages[0], tensors={"rows": messages[0].tensors["rows"]}), job)


def test_a_row_that_decodes_to_no_number_is_refused(tmp_path: Path) -> None:
    work, layout = Transformed(Drawn(), (Coded(parse_codecs(["bf16"])),)), Layout.of(SHARED)
    job, store = replace(_job(0), clients=(4, 5)), ClientStore(tmp_path)
    good, bad = (go(work, (c,), 0, store) for c in (4, 5))
    row_CB = bad.tensors[WIRE + layout.digest].clone()
    row_CB[0, 0:2] = torch.tensor([0x80, 0x7F], dtype=torch.uint8)  # infinity, as bfloat16
    bad = replace(bad, tensors={**bad.tensors, WIRE + layout.digest: row_CB})
    for replies in ([((4,), good), ((5,), bad)], [((4, 5), concatenate_messages([good, bad]))]):
        engine = ScriptedEngine(lambda _, replies=replies: replies)  # type: ignore[misc]
        came = collect(engine, [job], Mean(), admission=Admission(works={"w": work}))
        assert came.client_N.tolist() == [4]
        assert dict(came.attendance.refused) == {"finite": 1}


def norms(message: Message) -> list[float]:
    return trees.norm_C({n: message.tensors[n] for n in SHARED}).tolist()


def test_a_change_is_cut_at_the_client_and_who_does_not_cut_is_cut_at_the_server(tmp_path: Path) -> None:
    clip, bare = ClipChange(2.0), Transformed(Drawn(), ())
    work, store = Transformed(Drawn(), (clip,)), ClientStore(tmp_path)
    whole, cut = go(bare, (3, 4), 0, store), go(work, (3, 4), 0, store)
    assert min(norms(whole)) > 2.5
    assert norms(cut) == pytest.approx([2.0, 2.0], rel=1e-6)
    arrived = work.received(cut, _job(0))
    assert pack_message(arrived) == pack_message(cut)
    assert pack_message(work.received(whole, _job(0))) == pack_message(cut)
    small = replace(whole, tensors={n: x / 100 if n in SHARED else x for n, x in whole.tensors.items()})
    assert pack_message(work.received(small, _job(0))) == pack_message(small)
    with pytest.raises(LichenError, match="no norm"):
        ClipChange(0.0)


def test_transforms_stand_in_a_row(tmp_path: Path) -> None:
    work = Transformed(Drawn(), (ClipChange(2.0), Coded(parse_codecs(["int8"]), error_feedback=False)))
    message = go(work, (3,), 0, ClientStore(tmp_path))
    assert message.tensors.keys() == {"rows", WIRE + Layout.of(SHARED).digest}
    arrived = work.received(message, _job(0))
    assert norms(arrived) == pytest.approx([2.0], rel=0.02)
    assert max(norms(arrived)) <= 2.0 * (1 + 1e-5)
    assert (work.transforms[0].lacks, work.transforms[1].lacks) == (set(), {Property.SUMS})


def test_a_work_without_tensors_of_its_own_passes(tmp_path: Path) -> None:
    class Counts(Drawn):
        def final(self, state: Any) -> tuple[Message, Tree | None]:
            message, _ = super().final(state)
            return replace(message, tensors={"rows": message.tensors["rows"]}), None

    message, own = Transformed(Counts(), (Coded(CHAIN),)).final(
        Transformed(Counts(), (Coded(CHAIN),)).init(_job(0), (1,), None)
    )
    assert message.tensors.keys() == {"rows"}
    assert own is None
