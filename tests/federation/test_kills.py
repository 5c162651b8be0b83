"""A run over a real federation whose processes are killed one after another ends in the bytes of a simulation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

import lichen
from lichen.cli import main
from lichen.core.children import bound_environment
from lichen.federation.policy.keys import change_policy
from lichen.recipes.schema.yaml import dump_yaml
from support.tiny_llama import recipe, save_model, save_rows
from support.warm import warm_children

SITES = ("north", "east")
ROUNDS = 12


class Commands:
    """Commands of ``lichen`` that run, by a name."""

    def __init__(self, home: Path, warm: Path) -> None:
        self.home, self.warm, self.running = home, warm, dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str, *words: str, warm: bool = False) -> None:
        """Start a command; a warm one, which nobody kills, is forked from a process that has imported torch."""
        forked = warm_children(self.warm) if warm else nullcontext()
        with forked, open(self.home / f"{name}.log", "ab") as log:
            command = [sys.executable, "-m", "lichen", *words]
            self.running[name] = subprocess.Popen(
                command,
                cwd=self.home,
                env=bound_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        self.running[name].send_signal(signal.SIGKILL)
        self.running[name].wait()

    def said(self) -> str:
        return "".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in self.home.glob("*.log"))


@contextmanager
def commands(home: Path, warm: Path) -> Iterator[Commands]:
    made = Commands(home, warm)
    try:
        yield made
    finally:
        for process in made.running.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def until(what: Callable[[], bool], made: Commands, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, made.said()
        time.sleep(0.05)


def submitted(home: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Two sites of two people each, and the recipe of all."""
    save_model(home / "model")
    lines = save_rows(home / "all.jsonl", "pair", clients=4).read_text().splitlines()
    (home / "rows").mkdir()
    for at, site in enumerate(SITES):
        mine = [line for line in lines if json.loads(line)["who"] in (f"person-{2 * at}", f"person-{2 * at + 1}")]
        (home / "rows" / f"{site}.jsonl").write_text("\n".join(mine) + "\n")
    return recipe(
        home / "model",
        home / "rows",
        "pair",
        engine={"packing": False, "clients_per_block": 1},
        optimizer={"name": "adamw"},
        federation={"rounds": rounds, "local_steps": 8, "keep_optimizer": True, "schedule": {"least": 2}},
        wire={"up": ["int8~"], "down": ["int8"]},
    )


def learned(run: Path) -> dict[str, bytes]:
    files = [*run.glob("state/*/*/server.safetensors"), *run.glob("adapter/*.safetensors"), run / "roster.json"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_killed_at_every_place_it_ends_where_a_simulation_ends(
    federation: Path, tmp_path: Path, warm_folder: Path
) -> None:
    plain = submitted(tmp_path)
    lichen.run(plain, out=tmp_path / "simulated")
    (tmp_path / "recipe.yaml").write_text(dump_yaml({**plain, "data": {**plain["data"], "name": "elsewhere.jsonl"}}))
    run = tmp_path / "run"

    def rounds() -> int:
        file = run / "trace.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    with commands(tmp_path, warm_folder) as made:
        made.start("serve", "serve", str(federation), "--json")
        for site in SITES:
            kit = federation / "kits" / site
            change_policy(kit / "policy.yaml", [f"models={tmp_path / 'model'}"])
            rows = tmp_path / "rows" / f"{site}.jsonl"
            made.start(site, "join", str(kit), "--data", str(rows), warm=site != "north")
        at_sites = ("--federation", str(federation), "--sites", ",".join(SITES), "--wait", "120")
        made.start("submit", "submit", "recipe.yaml", *at_sites, "--out", str(run))
        until(lambda: rounds() >= 2, made)
        made.kill("submit")
        before = rounds()
        made.start("submit", "submit", "--resume", str(run), *at_sites, warm=True)
        until(lambda: rounds() >= before + 2, made)
        made.kill("north")
        again = ("join", str(federation / "kits/north"), "--data", str(tmp_path / "rows/north.jsonl"))
        made.start("north", *again, warm=True)
        before = rounds()
        until(lambda: rounds() >= before + 2, made)
        made.kill("serve")
        assert made.running["submit"].poll() is None, made.said()
        made.start("serve", "serve", str(federation))
        before = rounds()
        until(lambda: rounds() > before, made)
        for name in ("serve", "submit"):  # the coordinator's machine
            made.kill(name)
        made.start("serve", "serve", str(federation), "--resume", str(run), warm=True)
        until(lambda: (run / "summary.json").exists() and "the run is over" in made.said(), made)
        for name, place in (("north", "kits/north"), ("east", "kits/east"), ("serve", "")):
            assert main(["stop", str(federation / place)]) == 0
            assert made.running[name].wait(30) == 0, made.said()
    assert learned(run) == learned(tmp_path / "simulated")
    assert len(learned(run)) == 3
    lines = [json.loads(line) for line in (tmp_path / "serve.log").read_text().splitlines() if line.startswith("{")]
    assert {(line["site"], line["what"]) for line in lines} >= {(site, "is there") for site in SITES}
    assert "goes on with run" in (tmp_path / "north.log").read_text()


def without_nvflare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Processes that are started from here on end where they import it."""
    folder.mkdir()
    (folder / "nvflare.py").write_text("raise ImportError('nvflare is not installed')")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))


def test_over_grpc_and_without_nvflare_it_ends_there_too(
    grpc_federation: Path, tmp_path: Path, warm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, folder = submitted(tmp_path, rounds=4), grpc_federation
    lichen.run(plain, out=tmp_path / "simulated")
    (tmp_path / "recipe.yaml").write_text(dump_yaml({**plain, "data": {**plain["data"], "name": "elsewhere.jsonl"}}))
    run = tmp_path / "run"
    without_nvflare(tmp_path / "without", monkeypatch)
    with commands(tmp_path, warm_folder) as made:
        made.start("serve", "serve", str(folder))
        for site in SITES:
            kit, rows = folder / "kits" / site, tmp_path / "rows" / f"{site}.jsonl"
            change_policy(kit / "policy.yaml", [f"models={tmp_path / 'model'}"])
            made.start(site, "join", str(kit), "--data", str(rows), warm=site != "north")
        at_sites = ("--federation", str(folder), "--sites", ",".join(SITES), "--wait", "120")
        until(lambda: "is up" in made.said(), made)
        made.start("submit", "submit", "recipe.yaml", *at_sites, "--out", str(run), warm=True)
        until(lambda: (run / "trace.jsonl").exists(), made)
        serve, join = (psutil.Process(made.running[name].pid) for name in ("serve", "north"))
        assert serve.children() == []
        (worker,) = join.children()  # no process of NVFlare below it
        assert worker.children() == []
        made.kill("serve")
        assert made.running["submit"].poll() is None, made.said()
        made.start("serve", "serve", str(folder))
        until(lambda: made.running["submit"].poll() is not None, made)
        assert made.running["submit"].returncode == 0, made.said()
        for name, place in (("north", "kits/north"), ("east", "kits/east"), ("serve", "")):
            assert main(["stop", str(folder / place)]) == 0
            assert made.running[name].wait(30) == 0, made.said()
    assert learned(run) == learned(tmp_path / "simulated")
    assert len(learned(run)) == 3
    assert "the connection with the server has ended; connects anew" in (tmp_path / "north.log").read_text()
