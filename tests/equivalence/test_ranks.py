"""Whole runs on several ranks: the bytes of one rank, also after a stop and with another number of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import resume

import lichen
from lichen.present.trace import Event, read_trace
from support.forked_ranks import runs_on
from support.tiny_llama import recipe, save_model, save_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "model")
    save_rows(folder / "rows.jsonl", "pair")
    return folder


def made(home: Path, **more: Any) -> dict[str, Any]:
    engine = {"name": "distributed", "packing": False}  # padded: there a client's bits do not depend on its company
    return recipe(home / "model", home / "rows.jsonl", "pair", engine=engine, **more)


def go(what: dict[str, Any], folder: Path, ranks: int, *, resumed: bool = False) -> list[dict[str, Any]]:
    """Run it on so many ranks; what each returned."""

    def program() -> Any:
        return lichen.run(what, out=folder, resume=resumed).summary["columns"]

    return runs_on(ranks, program)


def differing(a: Path, b: Path) -> list[str]:
    one, other = resume.result_bytes(a), resume.result_bytes(b)
    assert "state/final.safetensors" in one
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@pytest.mark.parametrize(
    ("aggregate", "counts", "more"),
    [
        (
            "fedit",
            (2, 4),
            {
                "compare": {
                    "baselines": ["base", "alone", "alone_best", "pooled"],
                    "forms": ["plain"],
                    "alone_epochs": 3,
                }
            },
        ),
        ("fedex", (2,), {"optimizer": {"lr": [0.02, 0.1], "grid_rounds": 1}}),
        ("fedit", (2,), {"personal": {"kind": "ditto"}}),
        ("fedex", (2,), {"personal": {"kind": "finetune", "steps": [0, 2]}}),
    ],
)
def test_several_ranks_give_the_files_of_one(
    home: Path, tmp_path: Path, aggregate: str, counts: tuple[int, ...], more: dict[str, Any]
) -> None:
    what = made(home, federation={"aggregate": aggregate, "clients_per_round": 3, "rounds": 2}, **more)
    local = lichen.run({**what, "engine": {"name": "local", "packing": False}}, out=tmp_path / "local")
    for ranks in counts:
        ended = go(what, tmp_path / str(ranks), ranks)
        assert all(one == {"value": local.summary["columns"]} for one in ended)
        # The summary holds the recipe's digest, and that the engine's name.
        assert differing(local.folder, tmp_path / str(ranks)) == ["summary.json"]
        told = json.loads((tmp_path / str(ranks) / "summary.json").read_text())
        assert [told[name] for name in ("bytes_up", "bytes_down")] == [
            local.summary[name] for name in ("bytes_up", "bytes_down")
        ]
        assert told["bytes_up"] > 0


def test_a_stopped_run_goes_on_with_another_number_of_ranks(home: Path, tmp_path: Path) -> None:
    what = made(home, compare={"baselines": ["alone"]})
    assert all("value" in one for one in go(what, tmp_path / "whole", 1))

    def cut() -> Any:
        def stop(event: Event) -> None:
            if (event.column, event.report.round) == ("alone", 2):
                raise KeyboardInterrupt

        lichen.run(what, out=tmp_path / "cut", observers=[stop])

    assert [one.get("fault") for one in runs_on(3, cut)] == ["KeyboardInterrupt"] * 3
    told = [(e.column, e.report.round) for e in read_trace(tmp_path / "cut")]
    assert told == [("federated", 1), ("federated", 2), ("federated", 3), ("alone", 1), ("alone", 2)]
    assert all("value" in one for one in go(what, tmp_path / "cut", 2, resumed=True))
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_what_one_rank_refuses_all_refuse_and_only_a_new_folder_is_removed(home: Path, tmp_path: Path) -> None:
    what = made(home, data={"min_rows": 1000})
    ended = go(what, tmp_path / "new", 2)
    assert ended[0] == ended[1]
    assert "no client has 1000 rows" in ended[0]["error"]
    assert not (tmp_path / "new").exists()
    kept = tmp_path / "kept" / "recipe.yaml"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert all("is not empty" in one["error"] for one in go(made(home), kept.parent, 2))
    with pytest.raises(lichen.LichenError, match="is not empty"):
        lichen.run(made(home), out=kept.parent)
    assert kept.read_text() == "mine"


def command(folder: Path, *settings: str) -> list[str]:
    words = ["-s", "engine.name=distributed", *(word for setting in settings for word in ("-s", setting))]
    return [sys.executable, "-m", "lichen", "run", "digits", *words, "--out", str(folder), "--quiet", "--json"]


def test_the_command_starts_its_own_ranks_and_ctrl_c_stops_them_all(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path / "run", "federation.rounds=4000", "optimizer.lr=[0.3]"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    try:
        while not (tmp_path / "run" / "trace.jsonl").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert said.strip() == f"stopped; go on with: lichen run --resume {tmp_path / 'run'}"
    assert len(ranks) == 2
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_the_library_starts_ranks_too_and_tells_their_rounds(tmp_path: Path) -> None:
    settings = ["engine.name=distributed", "federation.rounds=2", "optimizer.lr=[0.3]", "compare.baselines=[]"]
    seen: list[Event] = []
    lines: list[str] = []
    result = lichen.run(
        lichen.read_recipe("digits", settings), out=tmp_path / "run", observers=[seen.append], say=lines.append
    )
    assert seen == list(read_trace(tmp_path / "run"))
    assert [e.report.round for e in seen] == [1, 2]
    assert any("clients" in line for line in lines)
    assert result.summary["columns"]["federated"]["mean"] > 0
