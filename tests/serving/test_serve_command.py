"""``lichen serve`` and ``lichen try`` as processes: where they answer, how they end, and that they need no network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lichen import cli
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.fm.local import LocalFM
from lichen.models.loading.load import load_causal
from support.random_gguf import save_gguf
from support.tiny_llama import save_model

INSTALLED = importlib.util.find_spec("xllamacpp") is not None
llama = pytest.mark.skipif(not INSTALLED, reason="xllamacpp is not installed")
CASES = [pytest.param("folder"), pytest.param("gguf", marks=llama)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_model(home / "folder")
    save_gguf(home / "gguf.gguf")
    return home


def path_of(home: Path, form: str) -> Path:
    return home / "gguf.gguf" if form == "gguf" else home / form


@contextmanager
def serving(*words: str, **more: Any) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A process of ``lichen serve --json``, and what it said of itself."""
    command = [sys.executable, "-m", "lichen", "serve", *words, "--json"]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes, **more) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.stderr and process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.kill()


def gone(url: str) -> bool:
    """Whether nobody listens there any more, within ten seconds."""
    port = int(re.findall(r":(\d+)/", url)[0])
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("form", "end"),
    [("folder", signal.SIGINT), *(pytest.param("gguf", end, marks=llama) for end in (signal.SIGINT, signal.SIGTERM))],
)
def test_it_answers_and_ends_with_ctrl_c(home: Path, tmp_path: Path, form: str, end: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with serving(str(path_of(home, form)), env=environment) as (process, about):
        assert about["model"] == form
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", about["url"])
        asked = HttpFM(Endpoint(url=about["url"], model=form, ask="first", max_retries=0))
        settings: dict[str, Any] = {"seeds": [0], "max_new_tokens": 5, "temperature": 0.0}
        (text,) = asked.generate(["w31 w32"], **settings)
        if form == "folder":
            assert [text] == LocalFM(*load_causal(home / "folder")).generate(["w31 w32"], **settings)
        process.send_signal(end)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "w31" not in out + err, "nothing that was asked is in a log"
        assert "Traceback" not in err
        assert gone(about["url"])
    assert list(tmp_path.iterdir()) == []


def test_it_ends_when_its_parent_dies(home: Path) -> None:
    form = "gguf" if INSTALLED else "folder"  # the one that has a child of its own
    code = (
        "import subprocess, sys, time; from lichen.core.children import bound_environment\n"
        "subprocess.Popen([sys.executable, '-m', 'lichen', 'serve', sys.argv[1]], env=bound_environment())\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(path_of(home, form))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        parent.kill()
        assert parent.wait() == -signal.SIGKILL
        assert parent.stdout.read() == "", "whoever held the other end has gone"
    assert gone(url)


OFFLINE = """
import fcntl, json, os, socket, struct, subprocess, sys, urllib.request
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:  # a namespace begins with its loopback down
    fcntl.ioctl(link, 0x8914, struct.pack("16sh14s", b"lo", 0x1 | 0x40, b""))
assert [name for _, name in socket.if_nameindex()] == ["lo"]
command = [sys.executable, "-m", "lichen", "serve", sys.argv[1], "--json"]
from lichen.core.children import bound_environment
with subprocess.Popen(command, stdout=subprocess.PIPE, env=bound_environment()) as process:
    about = json.loads(process.stdout.readline())
    body = json.dumps({"model": about["model"], "prompt": "w1 w2", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(about["url"] + "/completions", body, {"Content-Type": "application/json"})
    print(json.loads(urllib.request.urlopen(request).read())["choices"][0]["finish_reason"])
    process.kill()
"""


@pytest.mark.parametrize("form", CASES)
def test_it_answers_where_there_is_no_network(home: Path, form: str) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this system lets nobody leave its network")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [*alone, sys.executable, "-c", OFFLINE, str(path_of(home, form))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.stdout.strip() in ("length", "stop"), done.stderr


def test_try_answers_and_times(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(home / "folder")
    assert cli.main(["try", folder, "w1 w2", "w3", "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["try", folder, "w1 w2", "--time", "--delay", "0.02", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "resident" in out
    for way in ("in process", "HTTP, 0 ms", "HTTP, 20 ms"):
        assert way in out
    first = [float(line.split("ms")[-2].split()[-1]) for line in out.splitlines() if "HTTP" in line]
    assert first[1] >= 20


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["serve", "none"], "holds no federation, and no model"),
        (["serve", "folder", "--page", "1"], "--page: is for a federation"),
        (["serve", "folder", "--host", "0.0.0.0"], "everybody on the network"),
        (["serve", "folder", "--port", "70000"], "is no port"),
        (["serve", "folder", "--key-env", "NO_SUCH_KEY"], "no such variable"),
        (["serve", "--port", "80"], "--port: is for a model"),
        (["try", "folder", "w1", "--delay", "1"], "--delay: is measured with --time"),
        (["try", "folder", "w1", "--time", "--delay", "-1"], "is no delay"),
        (["try", "folder", "w1", "w2", "--time"], "ask one thing"),
        (["try", "folder", "w1", "--repetition-penalty", "2"], "is for runs"),
        (["try", "folder", "w1", "--model", "folder"], "is for an adapter"),
        (["try", "folder", "w1", "--temperature", "-1"], "temperature"),
    ],
)
def test_bad_words_are_two_lines(
    home: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    assert cli.main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "Loading" not in line]
    assert len(lines) == 2, lines
    assert why in "\n".join(lines)
    assert lines[1].startswith("  fix: ")


def test_counters_of_energy(tmp_path: Path) -> None:
    from lichen.serving.energy import joules_between, read_counters

    for name, value in (("intel-rapl:0", 900), ("intel-rapl:1", 5), ("intel-rapl:0:0", 1), ("intel-rapl:2", None)):
        (tmp_path / name).mkdir()
        if value is not None:
            (tmp_path / name / "energy_uj").write_text(f"{value}\n")
            (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    before = read_counters(tmp_path)
    assert before == {"intel-rapl:0": (900, 1000), "intel-rapl:1": (5, 1000)}
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    assert joules_between(before, read_counters(tmp_path)) == pytest.approx(200e-6)
    assert joules_between(read_counters(tmp_path / "none"), {}) is None
