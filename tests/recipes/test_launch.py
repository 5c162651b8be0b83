"""The launcher against ranks that are a few lines of Python: what they tell, how they end, who is left."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lichen
from lichen.core.contracts.algorithm import Report
from lichen.core.errors import LichenError
from lichen.engines.ranks import RankError
from lichen.models.loading import dtypes
from lichen.present.trace import Event, event_line
from lichen.recipes import launch as launching
from lichen.recipes.launch import launch
from lichen.recipes.schema.recipe import Recipe

HEAD = """
import json, os, signal, sys, time
rank = int(os.environ["RANK"])
def tell(kind, what):
    print(json.dumps([kind, what]), flush=True)
"""


def start(body: str, nodes: int = 2) -> tuple[list[Event], list[str]]:
    seen: list[Event] = []
    lines: list[str] = []
    command = [sys.executable, "-S", "-c", HEAD + textwrap.dedent(body)]
    launch(command, nodes=nodes, observers=[seen.append], say=lines.append)
    return seen, lines


def test_what_the_first_rank_tells_is_passed_on_in_order_to_the_last_line() -> None:
    report = Report(round=1, clients=(0, 3), metrics={"loss": 0.5}, tokens=7, bytes_up=1, bytes_down=2, seconds=0.25)
    event = Event(column="federated", report=report, total_rounds=2, grid="lr=0.1")
    body = f"""
        if rank == 0:
            tell("say", "ä first")
            tell("event", {json.dumps(event_line(event).decode())})
            for i in range(500):
                tell("say", str(i))
    """
    seen, lines = start(body)
    assert seen == [event]
    assert lines == ["ä first", *map(str, range(500))]


def test_each_rank_knows_its_place_and_its_share_of_the_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    body = f"""
        with open({str(tmp_path)!r} + "/" + os.environ["RANK"], "w") as file:
            json.dump([os.environ[name] for name in {names}], file)
    """
    cores = len(os.sched_getaffinity(0))
    for given, threads in ((None, str(max(1, cores // 3))), ("5", "5")):
        monkeypatch.delenv("OMP_NUM_THREADS") if given is None else monkeypatch.setenv("OMP_NUM_THREADS", given)
        start(body, nodes=3)
        for rank in range(3):
            told = json.loads((tmp_path / str(rank)).read_text())
            assert told == [str(rank), str(rank), "3", "3", threads, "lo"]


def test_an_error_and_a_fault_arrive_whole() -> None:
    with pytest.raises(LichenError) as told:
        start('tell("error", {"what": "is bad", "where": "a.b", "fix": "mend"}); sys.exit(2)')
    assert (told.value.what, told.value.where, told.value.fix) == ("is bad", "a.b", "mend")
    with pytest.raises(RankError, match="ValueError: no") as fault:
        start('tell("fault", {"text": "ValueError: no", "trace": "line 7"}); sys.exit(1)')
    assert fault.value.__notes__ == ["line 7"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("if rank == 1: os.kill(os.getpid(), 9)", "rank 1 was ended by signal 9"),
        ('if rank == 1: sys.exit("no disk")', r"rank 1 ended with 1; it said last:\n    no disk"),
        ("time.sleep(60 if rank == 0 else 0); sys.exit(3)", "rank 1 ended with 3; it said last:\n    nothing"),
    ],
)
def test_a_rank_that_ends_without_a_word_is_named_and_the_others_do_not_stay(
    monkeypatch: pytest.MonkeyPatch, body: str, words: str
) -> None:
    monkeypatch.setattr(launching, "GRACE", 0.3)
    begun = time.monotonic()
    with pytest.raises(LichenError, match=words):
        start(body)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("engine", ["spawned", "distributed"])
@pytest.mark.parametrize("command", [lichen.run, lichen.plan])
def test_more_processes_than_the_machine_carries_are_refused_before_any_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Callable[[Recipe], object], engine: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LichenError, match=r"100,000 processes are too many for \d+ core") as told:
        command(lichen.read_recipe("digits", [f"engine.name={engine}", "engine.nodes=100000"]))
    assert told.value.where == "engine.nodes"
    monkeypatch.setattr(launching, "device_free_bytes", lambda _: 400_000_000)
    with pytest.raises(LichenError, match=r"2 processes need 600 MB of memory .* and 400 MB are free") as told:
        command(lichen.read_recipe("digits", [f"engine.name={engine}", "engine.nodes=2"]))
    assert told.value.fix == "set it to 1, or end other programs"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("deaf", [False, True])
def test_ctrl_c_reaches_every_rank_once_and_the_deaf_are_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, deaf: bool
) -> None:
    monkeypatch.setattr(launching, "GRACE", 0.5)
    body = f"""
        home = {str(tmp_path)!r} + "/" + str(rank)
        def heard(*_):
            open(home + ".heard", "a").write("x")
            {"" if deaf else "sys.exit(130)"}
        signal.signal(signal.SIGINT, heard)
        open(home, "w").write(str(os.getpid()))
        until = time.monotonic() + 60
        while time.monotonic() < until:
            time.sleep(0.05)
    """

    def press() -> None:
        while not all((tmp_path / str(rank)).exists() and (tmp_path / str(rank)).read_text() for rank in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        start(body)
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.heard").read_text() == "x"
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_slow_numbers_are_warned_of_before_a_run_and_in_its_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu = tmp_path / "cpuinfo"
    monkeypatch.setattr(dtypes, "_CPU_INFO", cpu)
    assert dtypes.slow_dtype("bfloat16", "cpu") == ""  # nobody knows
    cpu.write_text("processor : 0\nflags : fpu avx2 avx512f\n")
    slow = dtypes.slow_dtype("bfloat16", "cpu")
    assert "no instructions for bfloat16" in slow
    assert (dtypes.slow_dtype("float32", "cpu"), dtypes.slow_dtype("bfloat16", "cuda")) == ("", "")
    recipe = lichen.read_recipe("digits", ["federation.rounds=1", "optimizer.lr=[0.3]", "compare.baselines=[]"])
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": "bfloat16"})})
    lines: list[str] = []
    lichen.run(recipe, out=tmp_path / "run", say=lines.append)
    assert lines[0] == f"model.dtype: {slow}"
    lines.clear()
    assert f"model.dtype: {slow}" in lichen.plan(recipe, say=lines.append, seconds=0.1).expected.notes
    assert lines[0] == f"model.dtype: {slow}"
    timed = [line for line in lines if "timing" in line or "stand side by side" in line or "counting" in line]
    assert len(timed) >= 4
    for flag in ("avx512_bf16", "amx_bf16"):
        cpu.write_text(f"flags : fpu {flag}\n")
        assert dtypes.slow_dtype("bfloat16", "cpu") == ""
