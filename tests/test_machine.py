"""What the machine refuses is one sentence and exit code 2, and nobody's files are lost; or the command goes on."""

from __future__ import annotations

import json
import os
import pwd
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lichen import cli
from lichen.core.machine import machine_fault

FEW = ["-s", "federation.rounds=1", "-s", "optimizer.lr=[0.3]", "-s", "compare.baselines=[]", "--quiet"]
SCRATCH = """task: chat
data: {name: rows.jsonl, form: plain}
model: {adapter: {kind: full}, scratch: {width: 1000000}}
"""

root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="takes rights away from root")
mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="mounts in a namespace of its own, which is not allowed here",
)
LICHEN = f"{sys.executable} -m lichen"


def one_sentence(error: str) -> str:
    """What was told, which is one sentence and at most one fix."""
    notes = ("run folder: ", "10 clients", "compare.pooled_batch_size: ")
    lines = [line for line in error.strip().split("\n") if not line.startswith(notes)]
    assert len(lines) <= 2, error
    assert len(lines) == 1 or lines[1].startswith("  fix: "), error
    assert "Traceback" not in error
    assert "crash" not in error
    return lines[0]


@pytest.fixture
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine", encoding="utf-8")
    Path("own").mkdir()
    rows = [{"client": f"c{i % 4}", "text": f"some words {i} and more of them"} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("scratch.yaml").write_text(SCRATCH, encoding="utf-8")


@pytest.mark.usefixtures("_home")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "a" * 300], "its name is too long for the file system"),
        (["--out", "/".join(["abcdefgh" * 8] * 80)], "its name is too long for the file system"),
        (["--out", "file"], "--out file: is a file"),
        (["--out", "file/run"], "file: "),
        (["--out", "own", "-s", "data.min_rows=9999"], "data.min_rows: no client has 9999 rows"),
        (
            ["--out", "own", "-s", "model.student.width=1000000000"],
            "own: there is not enough memory: 256000000000 bytes",
        ),
        (["--out", "own", "-s", f"model.student.width={10**30}"], "model.student.width: "),
        (
            ["--out", "new", "-s", "model.student.kind=image-cnn", "-s", "model.student.width=1000000"],
            "new: there is not",
        ),
    ],
)
def test_a_place_or_a_size_that_cannot_be_is_one_sentence(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().iterdir())
    assert cli.main(["run", "digits", *FEW, *words]) == 2
    assert told in one_sentence(capsys.readouterr().err)
    assert sorted(Path().iterdir()) == before
    assert list(Path("own").iterdir()) == []
    assert Path("file").read_text(encoding="utf-8") == "mine"


@pytest.mark.usefixtures("_home")
def test_a_model_from_nothing_that_no_memory_holds_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "scratch.yaml", "--quiet", "--out", "run"]) == 2
    assert "there is not enough memory" in one_sentence(capsys.readouterr().err)
    assert not Path("run").exists()


@pytest.mark.usefixtures("_home")
@pytest.mark.parametrize(
    ("limit", "most", "words", "told"),
    [
        (resource.RLIMIT_FSIZE, 1000, FEW, "would be larger than files may be here"),
        (
            resource.RLIMIT_NOFILE,
            1,
            [*FEW, "-s", "engine.name=spawned"],
            "more files are open than this process may have",
        ),
    ],
)
def test_limits_of_the_system_are_one_sentence(
    limit: int, most: int, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "digits", *FEW, "--out", "warm"]) == 0  # whatever is loaded late is loaded
    capsys.readouterr()
    before = resource.getrlimit(limit)
    most += len(os.listdir("/proc/self/fd")) if limit == resource.RLIMIT_NOFILE else 0
    resource.setrlimit(limit, (most, before[1]))
    try:
        code = cli.main(["run", "digits", *words, "--out", "run"])
    finally:
        resource.setrlimit(limit, before)
    assert code == 2
    assert told in one_sentence(capsys.readouterr().err)
    assert cli.main(["report", "warm"]) == 0


@pytest.mark.usefixtures("_home")
def test_a_clock_in_1970_a_home_and_a_cache_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time
    with monkeypatch.context() as patch:
        begun = now()
        patch.setattr(time, "time", lambda: now() - begun)
        assert cli.main(["run", "digits", *FEW, "--out", "run"]) == 0
        assert cli.main(["cache"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("LICHEN_CACHE", "file")
    assert cli.main(["fetch", "sotu"]) == 2
    one_sentence(capsys.readouterr().err)
    for name in ("HOME", "LICHEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: (_ for _ in ()).throw(KeyError("nobody")))
    assert cli.main(["cache"]) == 2
    assert one_sentence(capsys.readouterr().err) == "HOME: you have no home folder"
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "file")])
    assert cli.main(["plan", "digits"]) == 2
    assert one_sentence(capsys.readouterr().err) == "TMPDIR: there is no folder for temporary files"


def shell(script: str, folder: Path) -> tuple[int, str]:
    """Exit code and standard error of a few lines of shell."""
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


def test_streams_that_are_closed_full_or_of_few_letters_end_nothing(tmp_path: Path) -> None:
    script = f"""
        run="{LICHEN} report"
        $run none >&-; test $? = 2 || exit 31
        $run none 2>&-; test $? = 2 || exit 32
        $run none 2>/dev/full; test $? = 2 || exit 33
        {LICHEN} list >&- || exit 34
        PYTHONIOENCODING=latin-1 {LICHEN} list > latin || exit 35
        PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 LC_ALL=C {LICHEN} list > ascii || exit 36
        {LICHEN} list > all || exit 37
        {LICHEN} list >/dev/full 2>told; test $? = 2 || exit 38
    """
    code, error = shell(script, tmp_path)
    assert code == 0, error
    told = (tmp_path / "told").read_text()
    assert one_sentence(told) == "standard output: cannot be written: No space left on device"
    shown = {name: (tmp_path / name).read_bytes() for name in ("latin", "ascii", "all")}
    assert shown["ascii"].isascii()
    assert (
        shown["latin"].decode("latin-1").replace("-", "").split()
        == shown["all"].decode().replace("─", "").replace("-", "").split()
    )


SEVERAL = """
import sys
from lichen import cli
for words in sys.argv[1:]:
    code = cli.main(words.split())
    print(f"code {code}", file=sys.stderr, flush=True)
"""


@mounts
@root
def test_file_systems_that_take_nothing_or_are_full_and_a_folder_without_rights(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "several.py").write_text(SEVERAL)
    few = " ".join(FEW)
    runs = [
        "run digits --out fixed/run",
        f"run digits {few} -s data.min_rows=9999 --out point",
        f"run digits {few} -s model.student.width=400 --out small/run",
        "run digits --out closed/run",
    ]
    script = f"""
        mkdir fixed point small
        mount -t tmpfs -o ro none fixed || exit 30
        mount -t tmpfs none point && mount -t tmpfs -o size=200k none small || exit 30
        setpriv --bounding-set=-dac_override,-dac_read_search {sys.executable} several.py {shlex.join(runs)}
        mountpoint -q point && test -z "$(ls -A point)" || exit 31
    """
    code, error = shell(f"exec unshare -m bash -c {shlex.quote(script)}", tmp_path)
    assert code == 0, error
    *each, rest = error.split("code 2\n")
    assert rest == ""
    assert [one_sentence(one) for one in each] == [
        "fixed/run: can only be read: its file system lets nobody write",
        "data.min_rows: no client has 9999 rows; the largest has 194",
        "small/run: the disk is full",
        "closed/run: you have no right to this",
    ]


@root
def test_a_user_who_may_start_no_process(tmp_path: Path) -> None:
    rights = "+dac_override,+dac_read_search"
    other = f"setpriv --reuid=64321 --clear-groups --inh-caps={rights} --ambient-caps={rights} prlimit --nproc=1"
    code, error = shell(f"{other} {LICHEN} run digits {' '.join(FEW)} -s engine.name=spawned --out run", tmp_path)
    assert (code, one_sentence(error)) == (2, "run: no more processes or threads may be started")


def test_what_is_no_refusal_of_the_machine_stays_a_fault() -> None:
    assert machine_fault(ValueError("x")) is None
    assert machine_fault(FileNotFoundError(2, "No such file or directory", "a")) is None
    assert machine_fault(RuntimeError("shape mismatch")) is None
    assert str(machine_fault(MemoryError())).startswith("there is not enough memory\n")
