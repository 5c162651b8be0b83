"""A killed parent leaves nobody: its children, and theirs, end with it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from lichen.core import children

KILLS = int(os.environ.get("LICHEN_KILLS", "1"))
"""Of whole runs, for each engine; more where there is time: LICHEN_KILLS=10."""

CHILD = """
import subprocess, sys, time
from lichen.core import children
{patch}
children.end_with_parent()
subprocess.Popen(children.bound_command(["sleep", "600"]), env=children.bound_environment())
print("up", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys, time
from lichen.core.children import bound_environment
for _ in range(2):
    subprocess.Popen([sys.executable, "-c", {child!r}], env=bound_environment())
time.sleep(600)
"""


def moments(count: int, first: float, last: float) -> list[float]:
    """Seconds at random, others every time."""
    return [random.uniform(first, last) for _ in range(count)]


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def alive(tag: str) -> dict[int, str]:
    """All processes with this mark in their environment, but for those that only wait to be counted."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            marked = folder.name.isdigit() and tag.encode() in (folder / "environ").read_bytes()
            if marked and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def left_after_kill(command: list[str], delay: float, patience: float = 20.0) -> dict[int, str]:
    """Who is left a while after the command was killed, having lived so long; they are ended."""
    tag = f"LICHEN_TEST_{uuid.uuid4().hex}"
    process = subprocess.Popen(
        command, env={**os.environ, tag: "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(delay)
    process.kill()
    process.wait()
    until = time.monotonic() + patience
    while (left := alive(tag)) and time.monotonic() < until:
        time.sleep(0.05)
    for one in left:
        os.kill(one, signal.SIGKILL)
    return left


@linux
@pytest.mark.parametrize("asks_kernel", [True, False])
def test_children_and_grandchildren_end_at_whatever_moment_the_parent_is_killed(asks_kernel: bool) -> None:
    patch = "" if asks_kernel else "children.bound_by_kernel = lambda: False; children.EVERY = 0.05"
    command = [sys.executable, "-c", PARENT.format(child=CHILD.format(patch=patch))]
    assert {delay: left for delay in moments(4, 0.0, 0.6) if (left := left_after_kill(command, delay))} == {}
    loose = f"{patch}\nchildren.end_with_parent = lambda: None"  # and who is not bound is seen to be left
    command = [sys.executable, "-c", PARENT.format(child=CHILD.format(patch=loose))]
    assert len(left_after_kill(command, 1.0, patience=0.2)) >= 2


@linux
@pytest.mark.parametrize("engine", ["distributed", "spawned"])
def test_a_killed_run_leaves_no_rank_and_no_node(engine: str, tmp_path: Path) -> None:
    settings = [f"engine.name={engine}", "federation.rounds=4000", "optimizer.lr=[0.3]", "compare.baselines=[]"]
    words = [word for setting in settings for word in ("-s", setting)]
    command = [sys.executable, "-m", "lichen", "run", "digits", *words]
    for delay in moments(KILLS, 0.5, 9.0):
        assert left_after_kill([*command, "--out", str(tmp_path / str(delay))], delay) == {}, delay


def test_a_bound_program_is_the_program(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getppid(), 'LICHEN_PARENT' in os.environ, sys.argv[1:])"
    command = children.bound_command([sys.executable, "-c", code, "a b"])
    done = subprocess.run(command, env=children.bound_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == f"{os.getpid()} False ['a b']\n"
    missing = children.bound_command([str(tmp_path / "none")])
    assert subprocess.run(missing, env=children.bound_environment(), check=False).returncode == children.MISSING


@linux
def test_ranks_of_torchrun_end_with_it(tmp_path: Path) -> None:
    code = "from lichen.core.children import end_with_parent\nend_with_parent()\nimport time; time.sleep(600)"
    started = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {code!r}]); time.sleep(600)"
    command = ["env", "TORCHELASTIC_RUN_ID=1", sys.executable, "-c", started]
    assert left_after_kill(command, 1.0) == {}
