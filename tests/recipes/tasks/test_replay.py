"""A run that keeps its messages can be computed again to its bytes, or without a client; what it costs is planned."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core import tree as trees
from lichen.core.collecting.history import History
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe

SHORT = [
    "federation={rounds: 4, local_steps: 3, batch_size: 8, clients_per_round: 3, valid_every: 1, history: true}",
    "compare.baselines=[]",
    "data.partition.clients=5",
    "optimizer.lr=0.1",
]
KEPT = Path("state/federated/lr=0.1/history")


def recipe(*more: str) -> Any:
    return read_recipe("digits", [*SHORT, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lichen.run(recipe(), out=tmp_path_factory.mktemp("kept") / "run")


def test_it_is_off_by_default_and_changes_no_result(done: Any, tmp_path: Path) -> None:
    plain = lichen.run(recipe("federation.history=false"), out=tmp_path / "plain")
    assert not (plain.folder / KEPT).exists()
    assert read_recipe("digits").federation.history is False
    for file in ("state/final.safetensors", "clients.csv"):
        assert (plain.folder / file).read_bytes() == (done.folder / file).read_bytes()
    kept = done.folder / KEPT
    for path in (kept, *kept.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    assert [len(History(kept).clients(r)) for r in History(kept).rounds()] == [3, 3, 3, 3]
    with pytest.raises(LichenError, match="retained none"):
        lichen.replay(plain.folder)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["federation.server={name: adam, lr: 0.05}", "wire.up=[int8]", "wire.down=['topk:1/4', int8]"],
        ["optimizer={name: scaffold, lr: 0.1}", "federation.sampling=poisson"],
        ["federation.fair=minmax"],
        ["federation.keep_optimizer=true", "federation.drop_prob=0.3"],
        ["federation.patience=1", "optimizer.lr=[0.1, 0.3]", "optimizer.grid_rounds=2"],
    ],
)
def test_replayed_whole_it_has_the_runs_bytes(tmp_path: Path, more: list[str]) -> None:
    result = lichen.run(recipe(*more), out=tmp_path / "run")
    again = lichen.replay(result.folder)
    lr = f"lr={result.summary['extra']['lr.federated']:g}"
    state = load_state(result.folder / "state" / "federated" / lr / "server.safetensors")
    assert again.best_round == state.best_round > 0
    assert trees.digest(again.shared.flat()) == trees.digest(state.best.for_model.flat())
    assert again.mean == pytest.approx(result.summary["columns"]["federated"]["mean"], abs=0)
    assert list(again.scores.values()) == [row["federated"] for row in result.clients()]


def test_without_a_client_it_is_the_model_of_the_others_messages(done: Any) -> None:
    """Against a plain loop over the messages: the mean of the others' changes by their weights."""
    names = [row["client"] for row in done.clients()]
    history = History(done.folder / KEPT)
    seen = {int(message.client_C[0]) for message, _ in history.messages()}
    gone = min(seen)
    without = lichen.replay(done.folder, without=[names[gone]])
    state = load_state(done.folder / KEPT.parent / "server.safetensors")
    start = {name: x.double() for name, x in state.best.trainable.items()}
    for sign, some in ((-1, seen), (1, seen - {gone})):
        for round_ in range(without.best_round if sign > 0 else state.best_round):
            messages = [message for message, _ in history.messages(some, [round_])]
            weight = sum(float(m.weight_C[0]) for m in messages)
            for name in start if messages else ():
                mean = sum(m.tensors[name][0].double() * float(m.weight_C[0]) for m in messages) / weight
                start[name] = start[name] + sign * mean
    moved = 0.0
    for name, x in without.shared.trainable.items():
        assert (x.double() - start[name]).abs().max() < 1e-6
        moved = max(moved, float((x - state.best.trainable[name]).abs().max()))
    assert moved > 1e-3
    assert set(without.scores) == set(names)
    with pytest.raises(LichenError, match="no client 'nobody'"):
        lichen.replay(done.folder, without=["nobody"])


def test_a_forgotten_client_is_left_out(done: Any, tmp_path: Path) -> None:
    shutil.copytree(done.folder, tmp_path / "run")
    history = History(tmp_path / "run" / KEPT)
    gone = history.clients(0)[0]
    history.forget(gone)
    name = done.clients()[gone]["client"]
    assert lichen.replay(tmp_path / "run").scores == lichen.replay(done.folder, without=[name]).scores


class Killed(BaseException):
    """What a kill is to the process itself."""


def test_killed_and_resumed_or_in_other_processes_it_keeps_the_same_bytes(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = RunFolder.save, [0]

    def save_and_die(folder: RunFolder, path: Path, state: Any) -> None:
        saves[0] += 1
        if saves[0] == 3:
            raise Killed
        save(folder, path, state)

    monkeypatch.setattr(RunFolder, "save", save_and_die)
    with pytest.raises(Killed):
        lichen.run(recipe(), out=tmp_path / "cut")
    monkeypatch.undo()
    lichen.run(recipe(), out=tmp_path / "cut", resume=True)
    expected = contents(done.folder / KEPT)
    assert len(expected) == 12
    assert contents(tmp_path / "cut" / KEPT) == expected
    lichen.run(recipe("engine={name: spawned, nodes: 2}"), out=tmp_path / "spawned")
    assert contents(tmp_path / "spawned" / KEPT) == expected


@pytest.mark.parametrize("more", [[], ["wire.up=[int8]"], ["optimizer={name: scaffold, lr: 0.1}"]])
def test_a_plan_says_what_it_costs(tmp_path: Path, more: list[str]) -> None:
    made = recipe(*more)
    planned = lichen.plan(made)
    used = History(lichen.run(made, out=tmp_path / "run").folder / KEPT).nbytes()
    most = planned.expected.disk.history
    assert used <= most <= 1.1 * used
    assert "clients' messages" in str(planned)


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(LichenError) as told:
        recipe(
            "engine.clock={median: 60}",
            "federation.schedule={kind: buffered, arrivals: 3}",
            "federation.clients_per_round=null",
        )
    assert told.value.where == "federation.history"


def test_tasks_without_rounds_refuse_it() -> None:
    with pytest.raises(LichenError, match="clients answer once"):
        read_recipe("reviews-oneshot", ["federation.history=true"])
