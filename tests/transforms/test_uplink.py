"""Coded messages of any work: the same bytes in any company, and a memory that loses nothing for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core import tree as trees
from lichen.core.contracts import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import FAILED, Expected, TensorSpec, specs_of
from lichen.core.message import Job, Message, concatenate_messages, pack_message, size, take_client
from lichen.core.seeds import torch_generator
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.server.mean import Mean
from lichen.transforms.layout import Layout
from lichen.transforms.parse import parse_codecs
from lichen.transforms.uplink import WIRE, Compressed
from lichen.transforms.uplink_decode import Decoded

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


def go(work: Compressed, clients: tuple[int, ...], version: int, store: ClientStore) -> Message:
    """What :func:`lichen.core.fold.serve` does, for one block."""
    job = Job(work="w", shared=SHARED, version=version, clients=clients, seed=100 + version)
    message, own_C = work.final(work.init(job, clients, store.load(clients, version)))
    assert own_C is not None
    store.stage(clients, version + 1, own_C)
    return message


def meant(client: int, version: int) -> torch.Tensor:
    return Layout.of(SHARED).flatten(
        {n: x for n, x in Drawn().final((_job(version), (client,), None))[0].tensors.items() if n in SHARED}
    )[0]


def _job(version: int) -> Job:
    return Job(work="w", shared=SHARED, version=version, clients=(), seed=0)


def test_any_company_gives_a_clients_bytes_and_memory(tmp_path: Path) -> None:
    work = Compressed(Drawn(), parse_codecs(["topk:2/32", "int4"]))
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
    work, without = Compressed(Drawn(), chain), Compressed(Drawn(), chain, error_feedback=False)
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
    work, store = Compressed(Drawn(), CHAIN), ClientStore(tmp_path)
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
    work, store = Compressed(Drawn(), CHAIN), ClientStore(tmp_path)
    first = [pack_message(go(work, (1, 2), version, store)) for version in range(3)]
    again = pack_message(go(work, (1, 2), 2, store))
    assert again == first[2] != first[1]


def test_names_that_take_turns_share_a_memory_and_stand_side_by_side(tmp_path: Path) -> None:
    work, store = Compressed(Drawn(frozen=("l.lora_A",)), CHAIN), ClientStore(tmp_path)
    go(work, (1,), 0, store)
    go(work, (2,), 1, store)
    before = store.load((1,), 1)
    message = go(work, (1, 2), 3, store)  # version 3 freezes lora_A
    after = store.load((1,), 4)
    assert before is not None
    assert after is not None
    assert torch.equal(before["wire/l.lora_A"], after["wire/l.lora_A"])
    assert not torch.equal(before["wire/bias"], after["wire/bias"])
    layouts = (Layout.of(SHARED), Layout.of({n: x for n, x in SHARED.items() if n != "l.lora_A"}))
    assert WIRE + layouts[1].digest in message.tensors
    assert Decoded(Mean(), CHAIN, layouts).before(message).tensors.keys() == {"l.lora_B", "bias", "rows"}


def test_an_aggregator_decodes_in_any_order_and_refuses_strangers(tmp_path: Path) -> None:
    work, store, layout = Compressed(Drawn(), CHAIN), ClientStore(tmp_path), Layout.of(SHARED)
    mean = Decoded(Mean(), CHAIN, (layout,))
    messages = [go(work, (c,), 0, store) for c in (4, 5, 6)]
    messages = [replace(m, tensors={n: x for n, x in m.tensors.items() if n != "rows"}) for m in messages]
    totals = []
    for order in ([0, 1, 2], [2, 0, 1]):
        total = mean.zero()
        for i in order:
            total = mean.add(total, messages[i])
        totals.append(mean.close(mean.load(*mean.dump(total)), SHARED)[0])
    stacked = mean.close(mean.merge(mean.zero(), mean.add(mean.zero(), concatenate_messages(messages))), SHARED)[0]
    for name in SHARED:
        plain = sum(mean.before(m).tensors[name][0].double() for m in messages) / 3
        assert torch.equal(totals[0][name], totals[1][name])
        assert torch.equal(totals[0][name], stacked[name])
        assert torch.allclose(stacked[name].double(), plain, atol=1e-7)  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="are not expected"):
        Decoded(Mean(), CHAIN, ()).add(Mean().zero(), messages[0])
    with pytest.raises(LichenError, match="bytes a client"):
        Decoded(Mean(), parse_codecs(["int8"]), (layout,)).add(Mean().zero(), messages[0])


def test_a_work_without_tensors_of_its_own_passes(tmp_path: Path) -> None:
    class Counts(Drawn):
        def final(self, state: Any) -> tuple[Message, Tree | None]:
            message, _ = super().final(state)
            return replace(message, tensors={"rows": message.tensors["rows"]}), None

    message, own = Compressed(Counts(), CHAIN).final(Compressed(Counts(), CHAIN).init(_job(0), (1,), None))
    assert message.tensors.keys() == {"rows"}
    assert own is None
