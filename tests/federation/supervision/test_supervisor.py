"""A process that stands over a worker: what starts it again, what ends it, and what is said of it meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lichen import cli
from lichen.core.children import bound_environment
from lichen.federation.standing import site_standing
from lichen.federation.supervision import supervisor
from lichen.federation.supervision.endings import ending, final_code, out_of_memory
from lichen.federation.supervision.supervisor import pauses

STAND = """
import sys
from pathlib import Path
from lichen.federation.supervision import supervisor
supervisor._PAUSES = (float(sys.argv[2]), 60.0)
supervisor._UNPROVEN = float(sys.argv[3])
command = [sys.executable, *sys.argv[4:]]
made = supervisor.Supervisor(Path(sys.argv[1]), command, say=lambda line: print(line, flush=True))
code = made.run()
print("over", code, "torch" in sys.modules, "numpy" in sys.modules, flush=True)
"""
WORKER = """
import os, signal, sys, time
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
turns = len(open(sys.argv[1]).read().split())
what = sys.argv[2].split(",")[turns - 1]
if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    time.sleep(60)
sys.exit(int(what))
"""


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """What a kit says of itself, without keys."""
    startup = tmp_path / "kit" / "startup"
    startup.mkdir(parents=True)
    server = {"name": "trial", "service": {"target": "localhost:1"}}
    (startup / "fed_client.json").write_text(json.dumps({"servers": [server], "client": {"fqsn": "a"}}))
    return tmp_path / "kit"


@pytest.fixture
def site(kit: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a supervisor over a worker whose ends are named."""

    def start(ends: str, pause: float = 0.01, unproven: float = 0.0) -> subprocess.Popen[str]:
        words = [str(kit), str(pause), str(unproven), "-S", "-c", WORKER, str(tmp_path / "starts"), ends]
        return subprocess.Popen(
            [sys.executable, "-c", STAND, *words], stdout=subprocess.PIPE, text=True, env=bound_environment()
        )

    return start


def starts(tmp_path: Path) -> list[int]:
    file = tmp_path / "starts"
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def until(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("last", "code"), [("0", 0), ("2", 2), ("130", 130), ("143", 143)])
def test_signals_and_faults_start_it_again_until_an_end_that_is_meant(
    site: Callable[..., subprocess.Popen[str]], tmp_path: Path, last: str, code: int
) -> None:
    said = site(f"kill,1,{last}").communicate(timeout=30)[0].splitlines()
    assert len(starts(tmp_path)) == 3
    assert said == [
        "the worker of a was ended by signal 9 (SIGKILL); it is started again in 0 seconds",
        "the worker of a met a fault (exit code 1); it is started again in 0 seconds",
        f"over {code} False False",
    ]


def test_a_fault_before_anything_has_worked_is_passed_on(
    site: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    assert site("1,0", unproven=30.0).communicate(timeout=30)[0] == "over 1 False False\n"
    assert len(starts(tmp_path)) == 1


def test_pauses_grow_and_begin_anew_after_minutes_of_health() -> None:
    ran = [1.0] * 9
    assert [pauses(ran[:count]) for count in range(1, 10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert pauses([*ran, supervisor._HEALTHY]) == 1
    assert pauses([*ran, supervisor._HEALTHY, 1.0]) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ends", ["wait", "kill"])
def test_a_person_ends_it_while_the_worker_runs_and_between_two(
    site: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: int, code: int, ends: str
) -> None:
    process = site(ends, pause=60.0)
    until(lambda: starts(tmp_path))
    (worker,) = starts(tmp_path)
    if ends == "kill":
        until(lambda: not runs(worker))
        time.sleep(0.2)
    process.send_signal(number)
    assert process.communicate(timeout=30)[0].splitlines()[-1] == f"over {code} False False"
    assert starts(tmp_path) == [worker]
    assert not runs(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the worker")
def test_the_worker_ends_with_it(site: Callable[..., subprocess.Popen[str]], tmp_path: Path, kit: Path) -> None:
    words = [sys.executable, "-c", "import lichen.cli, time; lichen.cli.end_with_parent(); "]
    words[-1] += f"open({str(tmp_path / 'starts')!r}, 'a').write(f'{{__import__(\"os\").getpid()}}\\n'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", STAND, str(kit), "60", "0", *words[1:]])
    until(lambda: starts(tmp_path))
    (worker,) = starts(tmp_path)
    process.kill()
    process.wait()
    until(lambda: not runs(worker))


def test_stop_and_status_reach_it_between_two_workers(
    site: Callable[..., subprocess.Popen[str]], tmp_path: Path, kit: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = site("kill,kill,wait", pause=0.4)
    until(lambda: len(starts(tmp_path)) == 2)
    until(lambda: "signal 9" in str(site_standing(kit)["doing"]))
    standing = site_standing(kit)
    assert (standing["site"], standing["there"], standing["restarts"]) == ("a", False, 1)
    assert str(standing["doing"]).startswith("its worker was ended by signal 9 (SIGKILL); it is started again in ")
    assert str(standing["doing"]).endswith("; its worker was started again once")
    until(lambda: len(starts(tmp_path)) == 3)
    assert site_standing(kit)["doing"] == "its worker starts; its worker was started again 2 times"
    assert cli.main(["join", str(kit), "--data", "rows.csv"]) == 2
    assert "another process runs this kit" in capsys.readouterr().err
    assert cli.main(["stop", str(kit)]) == 0
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "over 0 False False"
    assert cli.main(["status", str(kit)]) == 2
    assert cli.main(["stop", str(kit)]) == 2
    assert not (kit / "supervisor").exists()


def test_a_join_that_cannot_begin_says_why_with_the_same_exit_code(
    kit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (kit / "policy.yaml").write_text("models: []\n")
    assert cli.main(["join", str(kit), "--data", str(tmp_path / "nowhere.csv")]) == 2
    said = capfd.readouterr()
    assert (said.out, said.err.splitlines()) == (
        "",
        [f"{tmp_path / 'nowhere.csv'}: no such file or folder", "  fix: check the path"],
    )
    assert cli.main(["join", str(tmp_path), "--data", "rows.csv"]) == 2
    assert "holds no kit" in capfd.readouterr().err


def test_who_was_out_of_memory_is_read_where_the_kernel_counts(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    assert out_of_memory(tmp_path, tmp_path) == {}
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\n")
    (tmp_path / "self" / "cgroup").write_text("4:cpu,memory:/box\n0::/site\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.oom_control").write_text("under_oom 0\noom_kill 1\n")
    group = "the group of processes that it is in"
    assert out_of_memory(tmp_path, tmp_path) == {group: 1, "the machine": 3}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "memory.events").write_text("oom 9\noom_kill 7\n")
    (tmp_path / "self" / "cgroup").write_text("0::/site\n")
    before = out_of_memory(tmp_path, tmp_path)
    assert before == {group: 7, "the machine": 3}
    assert supervisor._risen(before, {group: 8, "the machine": 4}) == group
    assert supervisor._risen(before, {group: 7, "the machine": 4}) == "the machine"
    assert supervisor._risen(before, before) == ""


def test_ends_in_words() -> None:
    assert ending(-signal.SIGSEGV) == "was ended by signal 11 (SIGSEGV)"
    assert ending(-signal.SIGSEGV, "the machine") == ending(-signal.SIGSEGV)
    assert ending(-64) == "was ended by signal 64 (SIGRTMAX)"
    assert [final_code(code) for code in (0, 2, 130, -2, -15, -6, -9, -11, 1, 3)] == [0, 2, 130, 130, 143, *[None] * 5]
    assert os.name == "posix"
