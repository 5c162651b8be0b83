"""Names of strangers on the screen: columns, clients, labels, files, summaries and answers steer no terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.visible import visible, visible_json
from lichen.present.progress import Progress
from test_cli import SUMMARY, Build

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj\u2066\r\x08\x7f\ufeff"
BAD = {letter for letter in EVIL if letter not in "0123456789;[]ownedJmgpj"}
SCORE = {"mean": 1.0, "worst_decile": 1.0}


def hostile_summary(folder: Path) -> Path:
    folder.mkdir()
    summary = {**SUMMARY, "name": f"run {EVIL}", "metric": EVIL, "question": EVIL}
    summary |= {"extra": {EVIL: EVIL}, "extra_columns": {EVIL: SCORE}, "versions": {EVIL: EVIL}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Hostile(Build):
    """Says, raises and answers what a stranger wrote."""

    def run(self, recipe: Any, *, out: Path, resume: bool, sites: Any = None, observers: Any, say: Any) -> Any:
        super().run(recipe, out=out, resume=resume, sites=sites, observers=observers, say=say)
        say(f"client {EVIL}")
        summary = {**SUMMARY, "name": EVIL, "extra": {EVIL: EVIL}}
        (out / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(summary=summary, folder=out, adapter=out / "adapter")

    def talk(self, folder: Path, **how: Any) -> Any:
        return SimpleNamespace(
            kind="chat", settings=EVIL, names=("bare model", "this run"), answer=lambda text: (EVIL, EVIL)
        )

    def export(self, folder: Path, *, merge: bool, out: Path | None, **more: Any) -> Path:
        raise LichenError(f"client {EVIL} has no rows", where=EVIL, fix=EVIL)


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import lichen.recipes

    fake, plan = Hostile(), ModuleType("lichen.recipes.plan.plan")

    def refuse(recipe: Any, *, say: Callable[[str], None]) -> None:
        say(f"column {EVIL}")
        raise LichenError(f"client {EVIL}", where=EVIL, fix=EVIL)

    plan.plan = refuse  # type: ignore[attr-defined]
    for module in ("lichen.recipes.run", "lichen.recipes.quantize.export"):
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(lichen.recipes, "run", fake, raising=False)
    monkeypatch.setitem(sys.modules, "lichen.recipes.plan.plan", plan)
    monkeypatch.setattr(lichen.recipes, "plan", plan, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("task: chat\nmodel: {name: tiny}\ndata: {name: rows.jsonl}\n", encoding="utf-8")
    Path("c.yaml").write_text(
        json.dumps({"question": EVIL, "base": "r.yaml", "methods": {"one": {}}}), encoding="utf-8"
    )
    (tmp_path / f"cache{EVIL}" / "prepared").mkdir(parents=True)
    (tmp_path / f"cache{EVIL}" / "prepared" / "a.safetensors").write_text("x")
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / f"cache{EVIL}"))
    hostile_summary(Path("foreign"))
    hostile_summary(Path("second"))
    rows = [{f"text{EVIL}": f"some words {i}", f"who{EVIL}": i % 2, "label": EVIL + "ab"[i % 2]} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("bad.jsonl").write_text(json.dumps({f"id{EVIL}": 5}) + "\n", encoding="utf-8")
    Path(f"odd{EVIL}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WALK: dict[str, list[list[str]]] = {
    "list": [["list"]],
    "fetch": [["fetch", EVIL]],
    "init": [
        ["init", "rows.jsonl", "--out", "x.yaml"],
        ["init", f"odd{EVIL}.jsonl", "--full", "--out", "y.yaml"],
        ["init", "bad.jsonl", "--out", "z.yaml"],
        ["init", "rows.jsonl", "--label", EVIL, "--out", "z.yaml"],
        ["init", EVIL],
    ],
    "plan": [["plan", "r.yaml"], ["plan", EVIL], ["plan", "r.yaml", "-s", f"{EVIL}=1"]],
    "run": [
        ["run", "r.yaml", "--out", "out"],
        ["run", "r.yaml", "--json", "--out", "json"],
        ["run", "r.yaml", "-s", f"task={json.dumps(EVIL)}", "--out", "no"],
        ["run", EVIL],
    ],
    "compare": [["compare", "c.yaml", "--out", "page"], ["compare", "c.yaml", "--json", "--out", "pages"]],
    "cache": [["cache"], ["cache", "--json"]],
    "try": [["try", "foreign", "hello"]],
    "report": [
        ["report", "foreign"],
        ["report", "foreign", "second"],
        ["report", "foreign", "--json"],
        ["report", EVIL],
    ],
    "export": [["export", "foreign"]],
    "verify": [["verify", EVIL]],
    "rebase": [["rebase", EVIL, "--model", EVIL], ["rebase", "foreign", "--model", EVIL]],
    "emulate": [["emulate", EVIL, "--out", "emu"], ["emulate", "foreign", "--ends", EVIL, "--out", "emu"]],
    "plug": [["plug", EVIL, "--into", EVIL, "--out", "new"], ["plug", "foreign", "--into", EVIL, "--out", "new"]],
    "forget": [
        ["forget", EVIL, "--client", EVIL],
        ["forget", "foreign", "--client", EVIL],
        ["forget", EVIL, "--site", EVIL],
    ],
    "pay": [["pay", EVIL, "--budget", "10"], ["pay", "foreign", "--budget", EVIL]],
    "fingerprint": [["fingerprint", EVIL]],
    "claim": [["claim", EVIL, "--secret", EVIL], ["claim", "foreign", "--secret", EVIL]],
    "audit": [["audit", EVIL]],
    "split-audit": [
        ["split-audit", EVIL],
        ["split-audit", EVIL, "--cuts", EVIL],
        ["split-audit", EVIL, "--code", EVIL],
    ],
    "influence": [["influence", EVIL], ["influence", "foreign", "--client", EVIL]],
    "card": [["card", EVIL], ["card", f"odd{EVIL}.jsonl"]],
    "federation": [
        ["federation", "policy", EVIL],
        ["federation", "connect", EVIL],
        ["federation", "bar", EVIL],
    ],
    "serve": [["serve", EVIL]],
    "join": [["join", EVIL, "--data", EVIL]],
    "submit": [["submit", "r.yaml", "--federation", EVIL], ["submit", EVIL, "--federation", EVIL]],
    "status": [["status", EVIL], ["status", EVIL, "--json"]],
    "stop": [["stop", EVIL]],
    "withdraw": [["withdraw", EVIL], ["withdraw", EVIL, "--of", EVIL]],
}


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("command", WALK)
def test_a_command_shows_names_as_what_they_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in WALK[command]:
        assert cli.main(words) in (0, 1, 2)
        out, err = capsys.readouterr()
        assert out + err
        assert not BAD & set(out + err), words
        if command != "list" and "--json" not in words and EVIL not in words:
            assert "\\x1b" in out + err or words[-1] in ("c.yaml", "pages"), words
    for file in Path().glob("?.yaml"):
        comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert not BAD & set("".join(comments))


def test_every_command_that_people_give_is_walked() -> None:
    shown = {name for name in cli.app if not name.startswith("-") and cli.app[name].show}
    assert shown <= set(WALK)


@pytest.mark.usefixtures("_here")
def test_json_on_the_screen_means_what_the_file_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "foreign", "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["name"] == f"run {EVIL}"
    assert json.loads(visible_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL


def test_a_table_on_a_terminal_keeps_its_own_styles(monkeypatch: pytest.MonkeyPatch) -> None:
    from lichen.present.table import new_table
    from lichen.shell import show

    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    table = new_table(EVIL, "a", "b")
    table.add_row("plain", "bold", style="bold")
    table.add_row(f"evil {EVIL}", "")
    show(table)
    shown = screen.getvalue()
    assert "\x1b[1m" in shown
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
    assert not (BAD - {"\x1b"}) & set(shown)


def test_progress_shows_names_as_what_they_are() -> None:
    from rich.console import Console

    for terminal in (False, True):
        screen = io.StringIO()
        with Progress(Console(file=screen, force_terminal=terminal, color_system=None)) as progress:
            progress.say(f"client {EVIL}")
        assert "\x1b]0" not in screen.getvalue()
        assert "\\x1b]0" in screen.getvalue()


def test_ordinary_letters_stay() -> None:
    text = "Zoë, 日本語, العربية, नमस्ते, 👩‍👩‍👧, ½ – “x”\tand\na line"
    assert visible(text) == text
