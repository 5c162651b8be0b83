"""Rounds with codecs both ways: one trajectory wherever they run, and the bytes that are really sent."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job, link
from lichen.core.replies import Reply
from lichen.core.rounds import load_state, run
from lichen.core.store import ClientStore, load_tree, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.engines.around import AroundEngine
from lichen.engines.distributed import DistributedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.ranks import Ranks
from lichen.engines.spawned import SpawnedEngine
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.server.mean import Mean
from lichen.server.sampling import Everyone
from lichen.transforms.codec import Chain
from lichen.transforms.delta import snapshot_name
from lichen.transforms.downlink import WHOLE, Deltas, Direct, DownlinkState
from support import compressed_run
from support.forked_ranks import on_ranks
from support.small_experiment import experiment

TESTS = Path(__file__).parents[1]
NODE = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("support.compressed_run", run_name="__main__", alter_sys=True)
"""

AGREED = Deltas(compressed_run.DOWN, agreed=True)


def snapshot_of(state: ServerState) -> Shared:
    """The view that clients hold."""
    return AGREED.snapshot(state.shared, state.downlink)


def go(made: Experiment, engine: Engine, folder: Path, *, rounds: int = 6, **more: Any) -> list[tuple[Any, ...]]:
    """What each round told, save for its time."""
    told: list[Report] = []
    run(
        compressed_run.average(made, rounds=rounds, **more),
        engine,
        lambda: made.start,
        rounds=rounds,
        seed=2,
        checkpoint=folder / "server.safetensors",
        observers=[told.append],
    )
    return [(r.round, r.clients, dict(r.metrics), r.bytes_up, r.bytes_down) for r in told]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def test_blocks_processes_and_ranks_share_one_trajectory(tmp_path: Path) -> None:
    made = experiment()
    told = go(made, compressed_run.local(made, tmp_path / "a" / "own"), tmp_path / "a", downlink=AGREED)
    assert told == go(
        made, compressed_run.local(made, tmp_path / "b" / "own", block=1), tmp_path / "b", downlink=AGREED
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    (tmp_path / "c").mkdir()
    command = [sys.executable, "-c", NODE, str(TESTS), str(tmp_path / "c" / "own")]
    with SpawnedEngine(command, nodes=1, agreed=snapshot_name(made.start)) as nodes:
        assert told == go(made, nodes, tmp_path / "c", downlink=AGREED)
    assert files(tmp_path / "a") == files(tmp_path / "c")

    def program(ranks: Ranks) -> Any:
        engine = DistributedEngine(compressed_run.local(made, tmp_path / "d" / "own"), ranks)
        return repr(go(made, engine, tmp_path / f"rank-{ranks.rank}", downlink=AGREED))

    assert on_ranks(2, program) == [{"value": repr(told)}] * 2
    server = (tmp_path / "a" / "server.safetensors").read_bytes()
    assert (tmp_path / "rank-0" / "server.safetensors").read_bytes() == server


class Killed(BaseException):
    """What a kill is to the process itself."""


def killed_amid(inner: Engine, count: int) -> Engine:
    """An engine whose process ends after the first message of the ``count``-th job."""
    left = [count]

    def on_job(job: Job) -> Job:
        left[0] -= 1
        return job

    def on_reply(reply: Reply, job: Job) -> Iterator[Reply]:
        yield reply
        if left[0] == 0:
            raise Killed

    return AroundEngine(inner, on_job=on_job, on_reply=on_reply)


@pytest.mark.parametrize("jobs", [1, 3, 4, 6, 8])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path, jobs: int) -> None:
    made = experiment()
    told = go(made, compressed_run.local(made, tmp_path / "whole" / "own", block=1), tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.raises(Killed):
        go(made, killed_amid(compressed_run.local(made, cut / "own", block=1), jobs), cut)
    again = go(made, compressed_run.local(made, cut / "own", block=1), cut)
    assert 0 < len(again) <= len(told)
    assert again == told[-len(again) :]
    assert files(tmp_path / "whole") == files(cut)


def watched(inner: Engine) -> tuple[Engine, list[tuple[int, int, str]], list[Tree]]:
    """``(the engine, how each client got what it trained or was judged on, the views)``."""
    seen, views = list[tuple[int, int, str]](), list[Tree]()

    def on_job(job: Job) -> Job:
        seen.extend((job.version, c, link(replace(job, clients=(c,)))) for c in job.clients)
        views.append(job.shared.flat())
        return job

    return AroundEngine(inner, on_job=on_job), seen, views


def test_everybody_is_sent_only_what_it_lacks_and_the_best_view_is_kept(tmp_path: Path) -> None:
    made = experiment()
    engine, seen, sent = watched(compressed_run.local(made, tmp_path))
    algorithm = compressed_run.average(made, sampler=Everyone(), valid_every=1)
    state = algorithm.init(made.start)
    views = []
    for r in range(5):
        state, _ = algorithm.round(state, engine, 10 + r)
        views.append(snapshot_of(state))
    assert [how for version, _, how in seen if version == 0] == ["full"] * 4
    # Trained on what it was judged by, and judged one step later.
    assert [how for version, _, how in seen if version == 3] == (["step"] * 4 + ["same"] * 4)
    best = views[state.best_round - 1]
    assert all(torch.equal(state.best.trainable[name], best.trainable[name]) for name in best.trainable)
    assert any(
        not torch.equal(state.shared.trainable[name], snapshot_of(state).trainable[name])
        for name in state.shared.trainable
    )
    assert all(torch.equal(sent[-1][name], views[-1].trainable[name]) for name in best.trainable)


def test_the_view_stays_near_the_servers_tensors_and_learns(tmp_path: Path) -> None:
    made = experiment()
    algorithm = compressed_run.average(made, sampler=Everyone(), rounds=25)
    state = run(algorithm, compressed_run.local(made, tmp_path), lambda: made.start, rounds=25, seed=1)
    moved = (
        sum(float((state.shared.trainable[n] - made.start.trainable[n]).square().sum()) for n in made.start.trainable)
        ** 0.5
    )
    off = (
        sum(
            float((state.shared.trainable[n] - snapshot_of(state).trainable[n]).square().sum())
            for n in made.start.trainable
        )
        ** 0.5
    )
    assert 0 < off < 0.25 * moved
    plain = compressed_run.average(made, sampler=Everyone(), rounds=25, downlink=WHOLE, aggregator=Mean())
    engine = LocalEngine(client_tasks(made), ClientStore(tmp_path / "plain"), block_size=3)
    exact = run(plain, engine, lambda: made.start, rounds=25, seed=1)
    assert state.best_value < 1.2 * exact.best_value


def test_a_codec_that_loses_nothing_changes_no_result_but_by_rounding(tmp_path: Path) -> None:
    made = experiment()
    plain = compressed_run.average(made, downlink=WHOLE, aggregator=Mean())
    states = {}
    for name, algorithm in {"plain": plain, "coded": replace(plain, downlink=Deltas(Chain()))}.items():
        engine = LocalEngine(client_tasks(made), ClientStore(tmp_path / name), block_size=3)
        states[name] = run(algorithm, engine, lambda: made.start, rounds=6, seed=1)
    assert states["plain"].downlink == {}
    for name, x in states["plain"].shared.trainable.items():
        assert torch.allclose(x, states["coded"].shared.trainable[name], atol=1e-5)
        assert torch.allclose(x, snapshot_of(states["coded"]).trainable[name], atol=1e-5)


def test_a_run_without_codec_goes_on_with_one(tmp_path: Path) -> None:
    made, file = experiment(), tmp_path / "server.safetensors"
    plain = compressed_run.average(made, downlink=WHOLE)
    run(plain, compressed_run.local(made, tmp_path / "own"), lambda: made.start, rounds=2, seed=1, checkpoint=file)
    tensors, header = load_tree(file)
    assert not [name for name in tensors if name.startswith("links/")]
    assert load_state(file).downlink == {}
    engine, seen, _ = watched(compressed_run.local(made, tmp_path / "own"))
    after = run(
        compressed_run.average(made, downlink=AGREED), engine, lambda: made.start, rounds=3, seed=1, checkpoint=file
    )
    assert {how for version, _, how in seen if version == 2} == {"full"}
    back = load_state(file)
    assert DownlinkState.of(back.downlink).name == snapshot_name(snapshot_of(after))
    save_tree(file, tensors, header)
    assert load_state(file).round == 2


def test_a_node_started_anew_is_sent_the_view_whole(tmp_path: Path) -> None:
    made = experiment()
    algorithm = compressed_run.average(made, sampler=Everyone(), valid=None)
    command = [sys.executable, "-c", NODE, str(TESTS), str(tmp_path / "own")]
    local = compressed_run.local(made, tmp_path / "here")
    here, there = algorithm.init(made.start), algorithm.init(made.start)
    bytes_there = []
    with SpawnedEngine(command, nodes=1) as nodes:
        for r in range(3):
            if r == 2:
                nodes.close()
            there, report = algorithm.round(there, nodes, r)
            here, same = algorithm.round(here, local, r)
            bytes_there.append((report.bytes_down, same.bytes_down))
    assert bytes_there[0][0] == bytes_there[0][1]
    assert bytes_there[1][0] == bytes_there[1][1] < bytes_there[0][1]
    assert bytes_there[2][0] == bytes_there[0][0] > bytes_there[2][1]
    assert all(torch.equal(here.shared.trainable[n], there.shared.trainable[n]) for n in here.shared.trainable)


class Halves:
    """Odd and even clients; to both the tensors are the same, but copies."""

    def key(self, client: int) -> Hashable:
        return client % 2

    def extract(self, shared: Shared, key: Hashable) -> Shared:
        return Shared({name: x.clone() for name, x in shared.trainable.items()})


def test_capacities_train_in_jobs_of_their_own_and_are_judged_together(tmp_path: Path) -> None:
    made = experiment()

    def plain(name: str) -> Engine:
        return LocalEngine(client_tasks(made), ClientStore(tmp_path / name), block_size=3)

    algorithm = compressed_run.average(
        made, sampler=Everyone(), downlink=Direct(Halves()), aggregator=Mean(), valid_every=1
    )
    (engine, seen, _), whole = watched(plain("a")), plain("b")
    state, report = algorithm.round(algorithm.init(made.start), engine, 3)
    assert [c for _, c, _ in seen] == [0, 2, 1, 3, 0, 1, 2, 3]
    assert report.clients == (0, 1, 2, 3)
    other, _ = replace(algorithm, downlink=WHOLE).round(algorithm.init(made.start), whole, 3)
    assert all(torch.equal(state.shared.trainable[n], other.shared.trainable[n]) for n in state.shared.trainable)
