"""A site whose disk is full says so at both ends, and has its place again once there is room; half a file is none."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.federation.test_host import Hosts, submit, submitted
from tests.federation.test_host import hosts as hosts

from lichen.core.errors import LichenError
from lichen.core.files import durable
from lichen.core.files.answers import SavedAnswers
from lichen.federation import processes
from lichen.federation.kits.settle import Kit
from lichen.federation.policy import guard
from lichen.federation.processes import Parent
from lichen.federation.supervision import supervisor
from lichen.federation.supervision.supervisor import Supervisor
from support.sites import SITES


class Disk:
    """Full or not; while it is, writes into a folder fail, and leave what a write leaves then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.is_full = folder, False

    def check(self, path: Path) -> None:
        if self.is_full and path.is_relative_to(self.folder):
            path.with_name(f".{path.name}.{os.getpid()}.part").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(tmp_path / "kits" / SITES[0])
    save, write = SavedAnswers.save, durable.write_atomic

    def saved(self: SavedAnswers, version: int, client: int, job: str, data: bytes, own: str) -> None:
        path = self._path(version, client, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        made.check(path)
        save(self, version, client, job, data, own)

    def written(path: Path, data: bytes, *, shared: bool = False) -> None:
        made.check(path)
        write(path, data, shared=shared)

    monkeypatch.setattr(SavedAnswers, "save", saved)
    monkeypatch.setattr(guard, "write_atomic", written)
    return made


def test_a_full_disk_costs_a_site_its_rounds_and_nothing_else(
    hosts: Callable[..., Hosts], tmp_path: Path, disk: Disk, capfd: pytest.CaptureFixture[str]
) -> None:
    made = hosts("label", labels="true")
    recipe = submitted(tmp_path, "label", optimizer={"lr": [0.02]}, compare={"baselines": []})
    rounds = list[int]()

    def look(event: Any) -> None:
        rounds.append(event.report.round)
        disk.is_full = len(rounds) == 1

    submit(made, recipe, observers=[look])
    trace = [json.loads(line) for line in (tmp_path / "run" / "trace.jsonl").read_text().splitlines()]
    assert [trace[0].get("attendance"), trace[2].get("attendance")] == [None, None]
    attended = trace[1]["attendance"]  # training and validation of three clients
    assert (attended["invited"], attended["arrived"], attended["refused"]) == (6, 4, {"error": 2})
    assert {(one["what"], one["fix"]) for one in attended["named"]} == {("the disk is full", "make room")}
    assert str(tmp_path) not in json.dumps(attended)
    assert not any("Traceback" in line for line in made.lines[SITES[0]])
    said = capfd.readouterr().err
    assert f"/{disk.folder.name}/runs/" in said  # a long path is cut in its middle
    assert "the disk is full\n  fix: make room" in said
    assert "Traceback" not in said
    (run,) = (one for one in (disk.folder / "runs").iterdir() if one.is_dir())
    assert list(json.loads((run / "trained.json").read_text()).values()) == [3]


def test_a_worker_that_dies_on_a_full_disk_is_started_again_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    startup = tmp_path / "kit" / "startup"
    startup.mkdir(parents=True)
    server = {"name": "trial", "service": {"target": "localhost:1"}}
    (startup / "fed_client.json").write_text(json.dumps({"servers": [server], "client": {"fqsn": "a"}}))
    lacks = ["kit: the disk is full", "kit: the disk is full", None]
    monkeypatch.setattr(supervisor, "_disk_fault", lambda kit: lacks.pop(0))
    monkeypatch.setattr(supervisor, "_PAUSES", (0.01, 60.0))
    monkeypatch.setattr(supervisor, "_LOOK", 0.01)
    said, file = list[str](), tmp_path / "starts"
    command = ["sh", "-c", f'echo >> {file}; test "$(wc -l < {file})" = 2 || kill -9 $$']
    assert Supervisor(tmp_path / "kit", command, say=said.append).run() == 0
    assert said[1:] == ["the worker of a waits: kit: the disk is full"]
    assert lacks == []


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_whether_there_is_room_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    if room:
        assert supervisor._disk_fault(tmp_path) is None
    else:
        full = Path("/dev/full")
        if not full.exists():
            pytest.skip("no device that is always full")
        monkeypatch.setattr(supervisor.private, "create", lambda path: os.open(full, os.O_WRONLY))
        assert supervisor._disk_fault(tmp_path) == f"{tmp_path}: the disk is full"
    assert list(tmp_path.iterdir()) == []


def test_nvflares_process_is_started_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_AGAIN", 0.01)
    full = [OSError(errno.ENOSPC, "No space left on device", "log"), OSError(errno.ENOSPC, "No space", "log")]

    def run(self: Parent) -> tuple[int, int]:
        if full:
            raise full.pop()
        self._closing.set()
        return 0, 0

    monkeypatch.setattr(Parent, "_run", run)
    said = list[str]()
    parent = Parent(Kit(tmp_path, "server", "trial", "here", "localhost", 1), {}, say=said.append)
    assert parent.ended.wait(20)
    assert (parent.fault, said) == (
        None,
        ["NVFlare's process cannot be started yet: log: the disk is full\n  fix: make room"],
    )


def test_a_process_that_is_lost_for_another_reason_is_no_end_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Parent) -> tuple[int, int]:
        raise ValueError("anything")

    monkeypatch.setattr(Parent, "_run", run)
    parent = Parent(Kit(tmp_path, "server", "trial", "here", "localhost", 1), {}, say=lambda line: None)
    end = time.monotonic() + 20
    while not parent.ended.is_set():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert isinstance(parent.fault, LichenError)
    assert "NVFlare's process is lost: ValueError" in str(parent.fault)
