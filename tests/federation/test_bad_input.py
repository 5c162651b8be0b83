"""What people get wrong at either end of a federation: each reads one sentence, with the place and what to do."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from lichen import __version__, cli
from lichen.core.files.lock import one_process
from lichen.federation.door import Door, Head, socket_folder
from lichen.federation.joining import check_before
from lichen.federation.policy.keys import change_policy

pytest.importorskip("nvflare")

GOOD = '{"ask": "where does it hurt", "reply": "here and there"}\n'
VERSIONS = {"lichen": __version__, "torch": metadata.version("torch")}


@pytest.fixture
def place(federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the federation, and with a site's kit, a policy and files beside it."""
    hidden = shutil.ignore_patterns("run", "supervisor", ".lock", ".submitted")
    shutil.copytree(federation, tmp_path / "trial", ignore=hidden)
    shutil.copytree(federation / "kits" / "a", tmp_path / "kit", ignore=hidden)
    change_policy(tmp_path / "kit" / "policy.yaml", ["models=[smollm2-135m]"])
    (tmp_path / "rows.jsonl").write_text(GOOD * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a person reads of a command that is refused; its last lines alone are the sentence."""
    assert cli.main(words) == 2, capsys.readouterr()
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert len(re.findall(r"^  fix: .+", said.err, re.MULTILINE)) == 1, said.err
    return said.err


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("nowhere.jsonl", None, "nowhere.jsonl: no such file or folder\n  fix: check the path"),
        ("empty.jsonl", "", "empty.jsonl: has no rows\n  fix: give data with at least a few rows"),
        ("bare.jsonl", '{"ask": null}\n' * 9, "bare.jsonl: has nothing in any column\n  fix: give the file that has"),
        ("torn.jsonl", GOOD + '{"ask": "where', "torn.jsonl, line 2: is not valid JSON"),
        ("letter.docx", "PK\x03\x04", "letter.docx: is a document (.docx), which is not read"),
    ],
)
def test_a_site_with_a_file_of_no_rows(
    place: Path, capsys: pytest.CaptureFixture[str], file: str, text: str | None, line: str
) -> None:
    if text is not None:
        Path(file).write_text(text, encoding="utf-8")
    assert line in read(["worker", "kit", "--data", file], capsys)


def test_which_columns_are_learned_is_for_recipes_to_say(place: Path) -> None:
    change_policy(place / "kit" / "policy.yaml", ["models=[]"])
    Path("rows.jsonl").write_text(
        '{"prompt": "how are you", "chosen": "well now", "rejected": "go on", "age": 3}\n' * 9, encoding="utf-8"
    )
    said = list[str]()
    check_before(Path("kit"), Path("rows.jsonl"), say=said.append)
    shown = ["  prompt: texts", "  chosen: texts", "  rejected: texts", "  age: numbers"]
    assert said[:5] == ["rows.jsonl: 9 rows looked at", *shown]
    assert "this site will say no to every recipe" in said[5]


def test_a_site_with_another_kit_or_policy(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def join(kit: str) -> str:
        return read(["worker", kit, "--data", "rows.jsonl"], capsys)

    assert "trial/server: is the server's kit\n  fix: start it with: lichen serve" in join("trial/server")
    assert "trial: holds no kit\n" in join("trial")
    policy = place / "kit" / "policy.yaml"
    policy.write_text("modells: [smollm2-135m]\n")
    assert re.search(r"policy.yaml: modells: .*\n  fix: .*models", join("kit"))
    policy.write_text("most_rounds: many\n")
    assert re.search(r"policy.yaml: most_rounds: .*many", join("kit"))
    policy.write_text("models: [smollm2-1350m]\n")
    assert "policy.yaml: models: 'smollm2-1350m' is no model of the catalog and no folder" in join("kit")
    policy.unlink()
    assert "without a policy this site allows nothing\n  fix: write one: lichen federation policy kit/" in join("kit")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["serve", "kit"], "kit: is a site's kit\n  fix: start it with: lichen join kit --data FILE"),
        (["serve", "nowhere"], "nowhere: holds no federation"),
        (["withdraw", "nowhere"], "nowhere: holds no kit"),
        (["withdraw", "nowhere", "--of", "b"], "nowhere: holds no kit"),
        (["withdraw", "kit", "--wait", "-1"], "--wait: is less than 0"),
        (["forget", "nowhere", "--site", "b"], "nowhere: holds no federation"),
        (["submit", "chat-lora"], "trial: nobody serves this federation here\n  fix: start it in another terminal"),
        (
            ["submit", "chat-lora", "--sites", "a,z"],
            "--sites: 'z' is no site of this federation, or barred\n  fix: one of",
        ),
        (["submit", "chat-lorry"], "chat-lorry"),
        (["submit"], "lichen submit --federation trial: no recipe\n"),
        (["submit", "chat-lora", "-s", "federation.rouns=2"], "federation.rouns"),
        (["submit", "--resume", "runs/none"], "--resume runs/none: has no recipe.yaml, so no run to go on with"),
        (["status", "trial"], "trial: nobody serves this federation here"),
        (["status", "kit"], "kit: does not run\n  fix: start it: lichen join kit --data FILE"),
        (["status", "nowhere"], "nowhere"),
        (["stop", "trial"], "trial: does not run\n  fix: there is nothing to stop"),
        (["stop", "kit"], "kit: does not run\n  fix: there is nothing to stop"),
        (["stop", "nowhere"], "nowhere: holds no kit"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else "",
)
def test_what_does_not_run_or_is_not_known(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert line in read(words, capsys)


class Served:
    """A server's door, at which somebody says who is there."""

    def __init__(self, kit: Path) -> None:
        self.seen: dict[str, Any] = {}
        self.door = Door(socket_folder(kit) / "door", self.answer, at_once=4)

    def answer(self, head: Head, body: bytes) -> tuple[Head, bytes]:
        assert head["op"] == "seen"
        return {"seen": self.seen}, b""

    def come(self, **versions: str) -> None:
        now = time.time()
        self.seen["a"] = {"since": now, "last": now, "instance": "1", "versions": {**VERSIONS, **versions}}


@pytest.fixture
def served(place: Path) -> Iterator[Served]:
    with ExitStack() as stack:
        made = Served(place / "trial" / "server")
        stack.callback(made.door.close)
        yield made


def test_sites_that_are_not_there_or_of_another_version(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "chat-lora", "--sites", "a", "--wait", "0", "--out", "run"]
    absent = read(words, capsys)
    assert re.search(r"site a: did not come within 0 seconds\n  fix: let its person start it .*--sites NAMES", absent)
    served.come(lichen="0.0.9")
    older = f"site a: has lichen 0.0.9, and the server has {__version__}\n  fix: install the same version at both ends"
    assert older in read(words, capsys)
    served.come(torch="1.0")
    assert "site a: has torch 1.0, and the server has" in read(words, capsys)
    served.come()
    told = read([*words, "-s", "compare.baselines=[base]", "-s", "data.public.share=0.1"], capsys)
    assert (
        "data.public: a server without rows: public rows are taken out of the clients' file\n  fix: remove it" in told
    )
    assert not Path("run").exists()


def test_one_run_at_a_time(served: Served, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with one_process(place / "trial" / "server", ".submitted", say=print):
        capsys.readouterr()
        told = read(["submit", "chat-lora", "--out", "run"], capsys)
    assert "trial: another run is going on\n  fix: wait for its end, or stop it with Ctrl-C" in told
