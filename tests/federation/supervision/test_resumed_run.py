"""A run that goes on beside a server: started again when it dies, and over when it has ended for good."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lichen import cli
from lichen.federation.supervision import supervisor
from lichen.federation.supervision.resumed_run import ResumedRun

RUN = """
import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    file.write("x")
what = sys.argv[2].split(",")[os.path.getsize(sys.argv[1]) - 1]
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    open(sys.argv[1] + ".up", "w").close()
    time.sleep(60)
sys.exit(int(what))
"""


def run_of(tmp_path: Path, ends: str, said: list[str]) -> ResumedRun:
    return ResumedRun([sys.executable, "-S", "-c", RUN, str(tmp_path / "starts"), ends], say=said.append)


def until(what: Callable[[], object], run: ResumedRun) -> None:
    end = time.monotonic() + 30
    while not what():
        run.look()
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("ends", "code", "last"),
    [
        ("kill,1,0", 0, "the run is over"),
        ("kill,1,3", 3, "the run is over"),
        ("kill,1,2", 2, "the run ended with exit code 2, as it says above"),
    ],
)
def test_it_goes_on_until_it_has_ended_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, code: int, last: str
) -> None:
    monkeypatch.setattr(supervisor, "_PAUSES", (0.01, 60.0))
    said = list[str]()
    run = run_of(tmp_path, ends, said)
    until(lambda: run.code is not None, run)
    run.look()
    assert (run.code, (tmp_path / "starts").read_text()) == (code, "xxx")
    assert said == [
        "the run was ended by signal 9 (SIGKILL); it goes on in 0 seconds",
        "the run met a fault (exit code 1); it goes on in 0 seconds",
        last,
    ]
    run.close()


def test_it_is_stopped_with_its_server_as_by_ctrl_c(tmp_path: Path) -> None:
    said = list[str]()
    run = run_of(tmp_path, "wait", said)
    until((tmp_path / "starts.up").exists, run)
    run.close()
    assert run._process is not None
    assert run._process.returncode == 130
    assert said == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["serve", "trial", "--resume", "nowhere"], "--resume nowhere: has no recipe.yaml, so no run to go on with"),
        (["serve", "model", "--resume", "run"], "--resume: is for a federation, and this is none"),
    ],
)
def test_what_cannot_go_on_is_refused_before_a_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial").mkdir()
    (tmp_path / "model").mkdir()
    about = '{"name": "trial", "host": "here", "port": 1, "fingerprint": "SHA256:00"}'
    (tmp_path / "trial" / "federation.json").write_text(about)
    (tmp_path / "trial" / "server").mkdir()
    assert cli.main(words) == 2
    assert line in capsys.readouterr().err
