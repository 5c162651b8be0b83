"""A client is unlearned from a finished run by an approximation: the new folder, a kill in it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.store import load_tree
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.schema.read import read_recipe, recipe_of
from lichen.recipes.withdrawal.near import unlearn
from lichen.recipes.withdrawal.options import NearOptions
from lichen.recipes.withdrawal.proof import prove
from lichen.recipes.withdrawal.report import REPORT
from lichen.recipes.withdrawal.request import Request, read_request

SHORT = [
    "federation={rounds: 4, local_steps: 4, batch_size: 8, clients_per_round: 3, valid_every: 1, history: true}",
    "compare.baselines=[alone]",
    "data.partition.clients=4",
    "optimizer.lr=[0.1, 0.3]",
    "optimizer.grid_rounds=1",
]
FINAL = Path("state/final.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lichen.run(read_recipe("digits", SHORT), out=tmp_path_factory.mktemp("near") / "run").folder


def asked(done: Path, how: str, out: Path) -> Request:
    return read_request(done, names(done)[1], how, out)


def names(done: Path) -> list[str]:
    return [row["client"] for row in lichen.report(done).runs[0].clients()]


@pytest.mark.parametrize("how", ["eraser", "negate", "npo"])
def test_the_new_folder_is_a_run_and_the_old_one_stays(done: Path, tmp_path: Path, how: str) -> None:
    before, seen = contents(done), list[str]()
    found = unlearn(asked(done, how, tmp_path / "new"), NearOptions(), against=done, say=seen.append)
    assert contents(done) == before
    assert json.loads((tmp_path / "new" / REPORT).read_text()) == found
    assert (found["approximate"], found["client"], found["against"]) == (True, names(done)[1], str(done))
    proof = prove(done, tmp_path / "new", 1, against=done).as_dict()
    assert found["proof"] == proof
    summary = lichen.report(tmp_path / "new").runs[0].summary
    recipe = recipe_of(tmp_path / "new")
    assert recipe.federation.absent == (names(done)[1],)
    assert recipe.optimizer.lr == (lichen.report(done).runs[0].summary["extra"]["lr.federated"],)
    assert summary["columns"]["federated"]["mean"] > 0.1
    assert verify(tmp_path / "new")
    new, old = (load_tree(folder / FINAL)[0] for folder in (tmp_path / "new", done))
    assert max(float((new[name] - x).abs().max()) for name, x in old.items()) > 1e-3
    grid = f"lr={recipe.optimizer.lr[0]:g}"
    state = load_state(tmp_path / "new" / "state" / "federated" / grid / "server.safetensors")
    assert all(torch.equal(new[name], x) for name, x in state.best.trainable.items())
    assert any(line.startswith(f"{how}: round") for line in seen)
    with pytest.raises(LichenError, match="finished run"):
        asked(done, how, tmp_path / "new")


def test_a_second_client_goes_from_the_new_folder_where_no_messages_are_needed(done: Path, tmp_path: Path) -> None:
    unlearn(asked(done, "npo", tmp_path / "one"), NearOptions(rounds=1))
    other = names(done)[3]
    with pytest.raises(LichenError, match="kept no messages"):
        unlearn(read_request(tmp_path / "one", other, "eraser", tmp_path / "none"), NearOptions())
    unlearn(read_request(tmp_path / "one", other, "npo", tmp_path / "two"), NearOptions(rounds=2))
    assert recipe_of(tmp_path / "two").federation.absent == (names(done)[1], other)
    lines = [json.loads(line) for line in (tmp_path / "two" / "trace.jsonl").read_text().splitlines()]
    assert [line["column"] for line in lines] == ["unlearning"] * 2
    assert lines[0]["clients"] == [3]
    assert 3 not in lines[1]["clients"]


class Killed(BaseException):
    """What a kill is to the process itself."""


@pytest.mark.parametrize("how", ["eraser", "npo"])
def test_killed_and_called_again_it_ends_in_the_same_bytes(
    done: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, save, saves = NearOptions(every=1, rounds=3), RunFolder.save, [0]
    unlearn(asked(done, how, tmp_path / "whole"), options)
    for kill in (2, 4):

        def killing(self: Any, path: Path, state: Any, kill: int = kill) -> None:
            saves[0] += 1
            if saves[0] == kill:
                raise Killed
            save(self, path, state)

        saves[0] = 0
        new = tmp_path / f"killed-{kill}"
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save", killing)
            with pytest.raises(Killed):
                unlearn(asked(done, how, new), options)
        unlearn(asked(done, how, new), options)
        assert (new / FINAL).read_bytes() == (tmp_path / "whole" / FINAL).read_bytes()
        other = asked(done, how, tmp_path / f"half-{kill}")
        shutil.copytree(new, other.out, ignore=shutil.ignore_patterns("summary.json"))
        (other.out / "recipe.yaml").write_text("name: another\n")
        with pytest.raises(LichenError, match="another command"):
            unlearn(other, options)


@pytest.mark.parametrize(
    ("how", "more", "what"),
    [
        ("eraser", ["federation.history=false"], "kept no messages"),
        ("negate", ["federation.history=false"], "kept no messages"),
        ("negate", ["federation.server={name: adam, lr: 0.05}"], "stepped by adam"),
        ("negate", ["federation.server={name: sgd, momentum: 0.9}"], "stepped by momentum"),
        ("negate", ["federation.robust={rule: median}"], "no plain mean"),
        ("npo", ["optimizer={name: scaffold, lr: 0.1}"], "optimizer.name: scaffold"),
        ("eraser", ["federation.fair=minmax"], "federation.fair: minmax"),
        ("npo", ["personal={kind: finetune}"], "personal"),
    ],
)
def test_what_a_way_cannot_do_is_refused_before_anything_is_written(
    done: Path, tmp_path: Path, how: str, more: list[str], what: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    from lichen.recipes.schema.read import write_recipe

    (folder / "recipe.yaml").write_text(write_recipe(read_recipe("digits", [*SHORT, *more])))
    with pytest.raises(LichenError, match=what):
        unlearn(asked(folder, how, tmp_path / "new"), NearOptions())
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"repair": -1}, {"rounds": 0}, {"beta": 0.0}, {"alpha": -1.0}, {"local": 2.0}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LichenError, match=r"--\w+"):
        NearOptions(**wrong)
    assert NearOptions().of("eraser") == {"every": 2, "local": 0.5}
    assert NearOptions().of("replay") == {}
    assert NearOptions.given("npo", gamma=0.3, rate=None) == NearOptions(gamma=0.3)
    with pytest.raises(LichenError, match="eraser does not read it"):
        NearOptions.given("eraser", gamma=0.3)
    with pytest.raises(LichenError, match="replay does not read it"):
        NearOptions.given("replay", every=1)


def test_the_command_shows_what_it_found(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, words = tmp_path / "new", ["forget", str(done), "--client", names(done)[1], "--how", "negate", "--repair", "0"]
    assert cli.main([*words, "--out", str(new), "--against", str(done), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = json.loads((new / REPORT).read_text())
    assert found["report"] == report
    assert (report["how"], report["options"]) == ("negate", {"rate": 1.0, "repair": 0})
    assert (found["how"], found["new"]) == ("negate", str(new))
    assert cli.main([*words, "--out", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    assert "approximate: this is not the model" in shown
    assert "membership AUC" in shown
    assert (tmp_path / "again" / FINAL).read_bytes() == (new / FINAL).read_bytes()
    assert cli.main([*words, "--out", str(tmp_path / "no"), "--against", str(tmp_path)]) != 0
    assert not (tmp_path / "no").exists()
    forgotten = lichen.forget(done, names(done)[0], how="npo", out=tmp_path / "third", rounds=1, gamma=0.5)
    assert forgotten.report["options"]["gamma"] == 0.5
