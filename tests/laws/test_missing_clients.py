"""The laws of an answer that did not count: it leaves no trace, at the server or at its client, however it was lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.core.collecting.rollback import with_rollback
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, specs_of
from lichen.core.fold import serve
from lichen.core.message import Job, Message, link, pack_job, size, sizes, unpack_job
from lichen.core.rounds import load_state, save_state
from lichen.core.seeds import torch_generator
from lichen.core.store import ClientStore, load_tree
from lichen.core.tree import Tree, digest
from lichen.core.wire.shared import Shared
from lichen.engines.federated import FederatedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.recipes.assemble.aggregation import downlink_of
from lichen.recipes.assemble.column import admission_of
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import algorithm_of, client_tasks, initial_shared
from lichen.recipes.schema.read import read_recipe
from lichen.server.schedules import Synchronous
from lichen.transforms.delta import apply_delta, encode_delta
from lichen.transforms.downlink import Deltas
from lichen.transforms.downlink_cache import SnapshotCache
from lichen.transforms.layout import Layout
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transformed
from lichen.transforms.uplink import WIRE, Coded
from support.missing import HOW, Losing, Those, WorkerSites
from support.small_experiment import RECIPE, experiment

ROUNDS = 6
EVERYONE = (0, 1, 2, 3)
LOST = {1: (1, 2), 2: (2,), 3: (0,), 4: (2, 3)}
"""Who is lost in which version: client 2 twice running, then once more; 1 and 3 once."""

FAMILY: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "int8~": {"wire": {"up": ["int8~"]}},
    "topk, int4": {"wire": {"up": ["topk:2/32", "int4"]}},
    "sign": {"wire": {"up": ["sign"]}},
    "sketch": {"wire": {"up": ["sketch:2"]}},
    "diloco": {"federation": {"keep_optimizer": True}},
    "diloco, coded": {"federation": {"keep_optimizer": True}, "wire": {"up": ["int4~"]}},
    "diloco, dropped": {"federation": {"keep_optimizer": True, "drop_prob": 0.3}},
    "scaffold": {"optimizer": {"name": "scaffold", "lr": 0.1}},
    "feddyn": {"optimizer": {"name": "feddyn", "lr": 0.1}},
    "fednova": {"optimizer": {"name": "fednova", "lr": 0.1}},
    "moon": {"optimizer": {"name": "moon", "lr": 0.1}},
    "moon, coded": {"optimizer": {"name": "moon", "lr": 0.1}, "wire": {"up": ["int8~"]}},
    "coded down": {"wire": {"up": ["int4~"], "down": ["topk:2/8", "int8"]}},
    "own model": {"personal": {"kind": "ditto"}},
}
"""Whatever clients keep between rounds, and what they are sent."""

member = pytest.mark.parametrize("name", FAMILY)


@cache
def made(name: str) -> Experiment:
    plain = experiment(len(EVERYONE))
    sections: dict[str, Any] = {**RECIPE}
    for section, more in FAMILY[name].items():
        sections[section] = {**sections.get(section, {}), **more}
    recipe = read_recipe({**sections, "federation": {**sections["federation"], "rounds": ROUNDS}})
    return Experiment.of(recipe, plain.model, plain.clients)


def start_of(name: str) -> Shared:
    return initial_shared(made(name).server, 0.1)


def rounds_of(name: str, **more: Any) -> Average:
    server = made(name).server
    return replace(algorithm_of(server, 0.1, ROUNDS), admission=admission_of(server), valid_every=3, **more)


def local(name: str, folder: Path) -> LocalEngine:
    return LocalEngine(client_tasks(made(name)), ClientStore(folder), block_size=1)


def go(
    algorithm: Average, engine: Any, state: ServerState, rounds: range = range(ROUNDS), file: Path | None = None
) -> ServerState:
    for version in rounds:
        state, _ = algorithm.round(state, engine, 100 + version)
        if file is not None:
            save_state(file, state)
            state = load_state(file)
    return state


def held(folder: Path, state: ServerState, rounds: int = ROUNDS) -> dict[int, str]:
    """What every client goes on from, as the next job would have it."""
    store = ClientStore(folder)
    found = {client: store.load([client], state.rollback.get(client, rounds)) for client in EVERYONE}
    return {client: digest(own) if own else "" for client, own in found.items()}


def answers(state: ServerState) -> tuple[Any, ...]:
    parts = (state.shared.flat(), state.optimizer, state.best.flat(), state.transforms)
    return *(digest(part) for part in parts), state.best_round, state.best_value


def without(name: str, folder: Path, lost: Mapping[int, tuple[int, ...]]) -> ServerState:
    """The oracle: those who are lost were never invited."""
    invited = [tuple(c for c in EVERYONE if c not in lost.get(v, ())) for v in range(ROUNDS)]
    algorithm = rounds_of(name, sampler=Those(invited))
    return go(algorithm, local(name, folder), algorithm.init(start_of(name)))


@member
def test_a_lost_answer_is_as_one_that_was_never_asked_for(name: str, tmp_path: Path) -> None:
    oracle = without(name, tmp_path / "oracle", LOST)
    for first in range(0, len(HOW), 2):  # each client is lost in each way
        lost = {v: {c: HOW[(first + v + c) % len(HOW)] for c in clients} for v, clients in LOST.items()}
        algorithm = rounds_of(name, sampler=Those([EVERYONE] * ROUNDS))
        engine = Losing(local(name, tmp_path / HOW[first]), lost)
        state = go(algorithm, engine, algorithm.init(start_of(name)), file=tmp_path / "state")
        assert answers(state) == answers(oracle)
        assert state.rollback == {}
        assert held(tmp_path / HOW[first], state) == held(tmp_path / "oracle", oracle)
    assert any(held(tmp_path / "oracle", oracle).values()) == (name not in ("plain", "fednova"))


@member
def test_answers_of_a_round_with_too_few_leave_no_trace(name: str, tmp_path: Path) -> None:
    """Rounds 1 and 4 have fewer than three: the oracle invites nobody to them."""
    oracle = without(name, tmp_path / "oracle", {**LOST, 1: EVERYONE, 4: EVERYONE})
    lost = {version: dict.fromkeys(clients, "late") for version, clients in LOST.items()}
    algorithm = rounds_of(name, sampler=Those([EVERYONE] * ROUNDS), schedule=Synchronous(least=3))
    state = go(algorithm, Losing(local(name, tmp_path / "few"), lost), algorithm.init(start_of(name)))
    assert answers(state) == answers(oracle)
    assert held(tmp_path / "few", state) == held(tmp_path / "oracle", oracle)


@pytest.mark.parametrize("name", ["diloco, coded", "coded down"])
def test_sites_that_are_asked_over_a_transport_go_on_alike(name: str, tmp_path: Path) -> None:
    oracle = without(name, tmp_path / "oracle", LOST)
    lost = {v: {c: HOW[(v + c) % len(HOW)] for c in clients} for v, clients in LOST.items()}
    algorithm = rounds_of(name, sampler=Those([EVERYONE] * ROUNDS))
    down = downlink_of(made(name).server)
    chain = down.chain if isinstance(down, Deltas) else None
    stores = {site: ClientStore(tmp_path / site) for site in ("even", "odd")}
    tasks = client_tasks(made(name))

    def worker(store: ClientStore) -> SiteWorker:
        return SiteWorker(lambda state: Talks(tasks, store, down=chain))

    workers = {site: worker(store) for site, store in stores.items()}
    with WorkerSites(workers) as sites, FederatedEngine(sites, lambda c: ("even", "odd")[c % 2]) as engine:
        state = go(algorithm, Losing(engine, lost), algorithm.init(start_of(name)))
    assert answers(state) == answers(oracle)
    for place, site in enumerate(stores):
        mine = held(tmp_path / site, state)
        assert all(mine[c] == held(tmp_path / "oracle", oracle)[c] for c in EVERYONE if c % 2 == place)


@pytest.mark.parametrize("name", ["int8~", "diloco, coded"])
def test_a_run_that_is_killed_after_a_lost_answer_goes_on_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    """The round after the loss is done twice: its first time was never saved."""
    algorithm, states = rounds_of(name), list[ServerState]()
    lost = {1: {1: "late", 2: "late"}, 2: {2: "failed"}}
    for folder, kills in (("whole", ()), ("killed", (2, 3))):
        file, state = tmp_path / f"{folder}.state", algorithm.init(start_of(name))
        for version in range(5):
            engine = Losing(local(name, tmp_path / folder), lost)
            if version in kills:
                go(algorithm, engine, state, range(version, version + 1))
            state = go(algorithm, engine, state, range(version, version + 1), file)
        states.append(state)
    assert (tmp_path / "whole.state").read_bytes() == (tmp_path / "killed.state").read_bytes()
    assert held(tmp_path / "whole", states[0], 5) == held(tmp_path / "killed", states[1], 5)


def test_a_state_in_which_every_answer_counted_has_the_bytes_that_it_had(tmp_path: Path) -> None:
    state = rounds_of("plain").init(start_of("plain"))
    save_state(tmp_path / "none", state)
    save_state(tmp_path / "some", replace(state, rollback={1: 4, 3: 0}))
    assert not [name for name in load_tree(tmp_path / "none")[0] if name.startswith("rollback")]
    assert load_state(tmp_path / "some").rollback == {1: 4, 3: 0}


CODES = ("int8~", "int4", "int2~", "sign", "topk:2/32", "sketch:2")


@pytest.mark.parametrize("word", CODES)
def test_what_arrived_and_what_is_remembered_is_what_the_counted_answers_meant(word: str, tmp_path: Path) -> None:
    """The sum of decoded answers that counted, and the memory, is the sum of their true changes."""
    chain, layout, store = parse_codecs([word]), Layout.of(SENT), ClientStore(tmp_path)
    work = Transformed(Meant(), (Coded(chain),))
    arrived, meant = torch.zeros(layout.size, dtype=torch.float64), torch.zeros(layout.size, dtype=torch.float64)
    rollback: dict[int, int] = {}
    for version in range(12):
        asked = Job(work="w", shared=Shared(SENT), version=version, clients=(3,), seed=version, rollback=rollback)
        (message,) = serve(unpack_job(pack_job(asked)), {"w": ClientTask(work=work, source=NoRows())}, store)
        if version % 4 in (1, 2) or version == 11:
            rollback = {3: rollback.get(3, version)}
            continue
        rollback = {}
        arrived += chain.decode(message.tensors[WIRE + layout.digest], layout)[0].double()
        meant += layout.flatten(drawn(version))[0].double()
    own = store.load((3,), rollback[3])
    assert own is not None
    memory = layout.flatten({name: own[f"wire/{name}"] for name in SENT})[0].double()
    assert torch.allclose(arrived + memory, meant, atol=1e-4)
    newest = store.load((3,), 12)
    assert newest is not None
    wrong = layout.flatten({name: newest[f"wire/{name}"] for name in SENT})[0].double()
    assert not torch.allclose(arrived + wrong, meant, atol=1e-4)


SENT = {"a": torch.zeros(6, 8), "b": torch.zeros(5)}


def drawn(version: int) -> Tree:
    draw = torch_generator(version, "change")
    return {name: torch.randn((1, *x.shape), generator=draw) for name, x in SENT.items()}


@dataclass(frozen=True)
class Meant:
    """A work whose change is drawn by the version alone."""

    def expected(self, job: Job) -> Expected:
        return Expected(group="g", tensors=specs_of(SENT))

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        return job

    def step(self, state: Any, batch: Batch) -> Any:
        return state

    def final(self, job: Any) -> tuple[Message, Tree | None]:
        ids, one = torch.tensor(job.clients), torch.ones(1, dtype=torch.float64)
        version = torch.full_like(ids, job.version)
        return Message(group="g", client_C=ids, version_C=version, tensors=drawn(job.version), weight_C=one), None


@dataclass(frozen=True)
class NoRows:
    def shape(self, client: int) -> int:
        return 0

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        return iter(())


@pytest.mark.parametrize("agreed", [False, True])
def test_a_client_that_was_away_is_sent_what_it_needs_and_holds_the_servers_view(agreed: bool) -> None:
    """Views are acknowledged by answers that arrived; a node that missed k rounds is brought to the oracle's bits."""
    chain = parse_codecs(["topk:2/8", "int8"])
    downlink, shared = Deltas(chain, agreed=agreed), Shared({"w": torch.zeros(64, 8)})
    nodes = {client: SnapshotCache(chain, shared if agreed else None) for client in range(6)}
    state, oracle, seen = downlink.init(shared, 6, first=True), shared, set[str]()
    away = {0: (), 1: (1, 2), 2: (2, 3, 4), 3: (1, 2, 3, 4, 5, 6, 7, 8), 4: (0, 1), 5: tuple(range(9))}
    for version in range(10):
        asked = Job(work="w", shared=shared, version=version, clients=tuple(range(6)), seed=version)
        (job,) = downlink.jobs(asked, state)
        arrived = [client for client, rounds in away.items() if version not in rounds]
        for client in arrived:
            one = unpack_job(pack_job(replace(job, clients=(client,))))
            seen.add(link(replace(job, clients=(client,))))
            assert digest(nodes[client].whole(one).shared.flat()) == digest(oracle.flat())
        state = downlink.acknowledge(job, arrived, state)
        draw = torch_generator(version, "step")
        shared = Shared({"w": shared.trainable["w"] + torch.randn(64, 8, generator=draw)})
        oracle = apply_delta(oracle, encode_delta(shared, oracle, chain, version), chain)
        state = downlink.advance(shared, state, seed=version)
        assert digest(downlink.snapshot(shared, state).flat()) == digest(oracle.flat())
    assert seen >= ({"step"} if agreed else {"full", "step"})


def test_a_job_says_who_goes_back_and_costs_the_others_nothing() -> None:
    plain = Job(work="w", shared=Shared({"w": torch.ones(3)}), version=7, clients=(1, 4, 9), seed=2)
    asked = replace(plain, rollback={4: 3, 8: 1})
    assert unpack_job(pack_job(asked)).rollback == {4: 3}
    assert unpack_job(pack_job(plain)).rollback == {}
    each = [len(pack_job(replace(asked, clients=(client,)))) for client in asked.clients]
    assert each[0] == each[2] == size(plain) < each[1]
    assert sizes(asked) == sum(each)
    for wrong in ({4: 8}, {4: -1}):
        with pytest.raises(LichenError, match="goes back to a version"):
            unpack_job(pack_job(replace(plain, rollback=wrong)))


def test_a_client_that_is_still_at_work_is_told_nothing_of_what_it_may_yet_bring() -> None:
    plain = Job(work="valid", shared=Shared(), version=7, clients=(1, 4), seed=2)
    assert with_rollback(plain, {1: 3, 4: 5}, busy={4}).rollback == {1: 3}
    assert with_rollback(plain, {2: 3}) is plain
