"""A client is forgotten exactly: the new folder has the bytes of a run to which it never came, the old one its own."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.files.checkpoints import checkpoint_rounds
from lichen.present.trace import read_trace
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.withdrawal.start import start_of
from support.tiny_llama import recipe as tiny
from support.tiny_llama import save_model, save_rows

SHORT = [
    "federation={rounds: 4, local_steps: 2, batch_size: 8, clients_per_round: 2}",
    "data.partition.clients=6",
    "optimizer.lr=[0.1]",
    "compare.baselines=[]",
]
SAME = ("state/final.safetensors", "clients.csv", "recipe.yaml", "roster.json")
LATE = "client-002"
"""Invited to round 3 first, by the seed of this recipe; and no client that validates where one alone does."""


def digits(*more: str) -> Any:
    return read_recipe("digits", [*SHORT, *more])


def without(recipe: Any, *names: str) -> Any:
    return recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"absent": names})})


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def told(folder: Path) -> list[Any]:
    """The trace but for seconds, rates one after the other, and what the record says of each round."""
    events = sorted(read_trace(folder), key=lambda event: (event.column, event.grid))
    record = [json.loads(line) for line in (folder / "record.jsonl").read_text().splitlines()]
    rounds = [{**line, "before": ""} for line in record if line["kind"] == "round"]
    return [
        [replace(event, report=replace(event.report, seconds=0.0)) for event in events],
        sorted(rounds, key=lambda line: (line["column"], line["round"])),
    ]


def require_alike(new: Path, absent: Path) -> None:
    for name in SAME:
        assert (new / name).read_bytes() == (absent / name).read_bytes(), name
    assert told(new) == told(absent)
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (new, absent))
    unlike = {key for key in one if one[key] != other[key]}
    assert unlike <= {"seconds", "peak_memory_bytes", "energy_joules"}


@pytest.mark.parametrize(
    ("more", "rounds"),
    [
        (["engine.history=1"], 2),  # it validates, so that two rounds are judged anew
        (["engine.history=1", "optimizer={name: scaffold, lr: 0.1}", "federation.server={name: adam}"], 2),
        (["engine.history=2", "federation.valid_clients=1", "wire.up=['topk:1/4']"], 2),  # copied as they are
        (["engine.history=1", "optimizer={lr: [0.1, 0.3], grid_rounds: 2}"], 2),
        (["engine.history=1", "federation.fair=minmax"], 0),
        ([], 0),
    ],
)
def test_a_replay_has_the_bytes_of_a_run_to_which_it_never_came(tmp_path: Path, more: list[str], rounds: int) -> None:
    whole = digits(*more)
    old = lichen.run(whole, out=tmp_path / "old").folder
    before = bytes_in(old)
    found = lichen.forget(old, LATE)
    assert {start for start, _ in found.starts.values()} == {rounds}
    require_alike(found.new, lichen.run(without(whole, LATE), out=tmp_path / "absent").folder)
    assert bytes_in(old) == before
    lichen.verify(found.new)


class Killed(BaseException):
    """What a kill is to the process itself."""


def test_killed_and_called_again_it_goes_on_to_the_same_bytes_and_a_second_client_may_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digits("engine.history=1")
    old, save, saves = lichen.run(whole, out=tmp_path / "old").folder, RunFolder.save, [0]

    def killing(folder: RunFolder, path: Path, state: Any) -> None:
        saves[0] += 1
        if saves[0] in (2, 6):  # while rounds are copied, and while others are trained
            raise Killed
        save(folder, path, state)

    monkeypatch.setattr(RunFolder, "save", killing)
    new = tmp_path / "new"
    for there in (False, True):
        with pytest.raises(Killed):
            lichen.forget(old, LATE, out=new)
        assert new.is_dir() == there
    found = lichen.forget(old, LATE, out=new)
    assert found.starts["lr=0.1"][0] == 2
    require_alike(new, lichen.run(without(whole, LATE), out=tmp_path / "absent").folder)
    assert checkpoint_rounds(new / "state" / "federated" / "lr=0.1") == [1, 2, 3, 4]
    second = lichen.forget(new, "client-001", out=tmp_path / "second")
    assert second.starts["lr=0.1"][0] == 1
    require_alike(second.new, lichen.run(without(whole, LATE, "client-001"), out=tmp_path / "both").folder)
    with pytest.raises(LichenError, match="never took part in this run"):
        lichen.forget(new, LATE, out=tmp_path / "again")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("forget")
    save_model(home / "model")
    for shape in ("pair", "label"):
        save_rows(home / f"{shape}.jsonl", shape)  # type: ignore[arg-type]
    return home


def test_an_adapter_is_replayed_to_its_bytes(home: Path, tmp_path: Path) -> None:
    fed = {"rounds": 3, "local_steps": 1, "clients_per_round": 2}
    whole = read_recipe(tiny(home / "model", home / "pair.jsonl", "pair", federation=fed, engine={"history": 1}))
    old = lichen.run(whole, out=tmp_path / "old").folder
    first: dict[int, int] = {}
    for event in read_trace(old):
        for client in event.report.clients:
            first.setdefault(client, event.report.round)
    gone = f"person-{max(first, key=lambda client: first[client])}"
    found = lichen.forget(old, gone)
    assert found.starts["lr=0.02"][0] == max(first.values()) - 1 > 0
    absent = lichen.run(without(whole, gone), out=tmp_path / "absent")
    require_alike(found.new, absent.folder)
    adapter = Path("adapter/adapter_model.safetensors")
    assert (found.new / adapter).read_bytes() == (absent.folder / adapter).read_bytes()


def test_a_heads_sums_lose_its_part_and_nothing_else(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tiny(home / "model", home / "label.jsonl", "label", compare={"baselines": ["alone"], "partitions": 1})
    made = {key: x for key, x in made.items() if key not in ("federation", "optimizer")}
    whole = read_recipe({**made, "task": "oneshot", "model": {"name": str(home / "model")}})
    old = lichen.run(whole, out=tmp_path / "old").folder
    assert cli.main(["forget", str(old), "--client", "person-3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["how"], found["starts"]) == ("subtract", {})
    absent = lichen.run(without(whole, "person-3"), out=tmp_path / "absent").folder
    require_alike(Path(found["new"]), absent)
    sums = "state/scores/sums.safetensors"
    assert (Path(found["new"]) / sums).read_bytes() == (absent / sums).read_bytes()
    assert not (Path(found["new"]) / "state" / "scores" / "features" / "train-3.safetensors").exists()
    again = lichen.forget(found["new"], "person-0", how="replay", out=tmp_path / "again")
    require_alike(again.new, lichen.run(without(whole, "person-3", "person-0"), out=tmp_path / "both").folder)


def test_what_cannot_be_forgotten_exactly_is_refused_by_its_place(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rng = [[(at * 7 + place) % 5 for place in range(6)] for at in range(60)]
    rows.write_text(
        "".join(json.dumps({"client": f"c{at % 3}", "numbers": x, "label": at % 2}) + "\n" for at, x in enumerate(rng))
    )
    page = {
        "task": "classify",
        "model": {"student": {"kind": "image-mlp"}},
        "data": {"name": str(rows), "valid": 0.2, "test": 0.2},
        "federation": {"rounds": 1, "local_steps": 1},
        "compare": {"baselines": []},
        "engine": {"history": 1},
    }
    old = lichen.run(read_recipe(page), out=tmp_path / "old").folder
    kept = old / "state" / "federated" / "lr=0.001" / "checkpoints" / "1.safetensors"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    for arguments, part in (
        ({"client": "c9"}, "json: c0, c1, c2"),
        ({"client": "c1", "how": "subtract"}, "is no sum of what its clients sent"),
    ):
        with pytest.raises(LichenError, match=part):
            lichen.forget(old, **arguments)
    rows.write_text(rows.read_text().replace("c1", "c2"))
    with pytest.raises(LichenError, match="has changed since the run began"):
        lichen.forget(old, "c1")
    assert not (tmp_path / "old-without-c1").exists()


def test_a_plan_counts_the_states_that_stay(tmp_path: Path) -> None:
    whole = digits("engine.history=2", "optimizer={name: scaffold, lr: 0.1}")
    planned = lichen.plan(without(whole, "client-000"), seconds=0.05)
    run = lichen.run(whole, out=tmp_path / "run").folder / "state" / "federated" / "lr=0.1"
    states = [file.stat().st_size for file in (run / "checkpoints").rglob("*.safetensors")]
    assert checkpoint_rounds(run) == [2, 4]
    assert 0.4 * sum(states) < planned.expected.disk.checkpoints < 2.5 * sum(states)
    assert lichen.plan(digits(), seconds=0.05).expected.disk.checkpoints == 0


def test_a_start_is_before_the_client_mattered_in_any_way() -> None:
    """Every way that makes round 0 the start has a sentence of its own."""
    said = {
        why: start_of(digits("engine.history=1", *more), 0, [], [1], judges=False)
        for why, more in {
            "kept no state": ["engine.history=0"],
            "wire.down": ["wire.down=[int8]"],
            "federation.fair": ["federation.fair=tilted"],
            "valued by all": ["value={kind: first}"],
        }.items()
    }
    for why, start in said.items():
        assert start.round == 0
        assert why in start.why
