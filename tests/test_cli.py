"""The command line: few flags and pinned, errors in one sentence, nothing on standard output but results."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.recipes.schema.read import recipe_sha256
from lichen.shell import crash
from support.warm import MAY_DIFFER

RECIPE = "name: small\ntask: chat\nmodel: {name: tiny}\ndata: {name: rows.jsonl}\n"
SUMMARY: dict[str, Any] = {
    "name": "small",
    "question": "",
    "task": "chat",
    "metric": "perplexity",
    "higher_is_better": False,
    "columns": {"base": None, "alone": None, "federated": {"mean": 15.0, "worst_decile": 30.0}, "pooled": None},
    "extra_columns": {},
    "share_gaining": None,
    "gaining_over": None,
    "gains": {},
    "clients": 2,
    "bytes_up": 1,
    "bytes_down": 1,
    "traffic": None,
    "attendance": None,
    "training": {},
    "failures": [],
    "seconds": 1.0,
    "peak_memory_bytes": 1,
    "energy_joules": None,
    "compute": None,
    "read": None,
    "licences": {},
    "cards": [],
    "cards_left": [],
    "attack": None,
    "privacy": None,
    "masks": None,
    "seed": 0,
    "versions": {},
    "recipe_sha256": "0" * 64,
    "extra": {},
}


class Build(ModuleType):
    """Stands in for the heavy part: notes its calls and leaves what a run leaves."""

    def __init__(self) -> None:
        super().__init__("lichen.recipes.run")
        self.calls: list[dict[str, Any]] = []
        self.signed = False
        self.fault: Callable[[], BaseException | None] = lambda: None

    def run(self, recipe: Any, *, out: Path, resume: bool, sites: Any = None, observers: Any, say: Any) -> Any:
        self.calls.append({"recipe": recipe, "out": out, "resume": resume})
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(RECIPE)
        print("a library prints")
        say("working")
        fault = self.fault()
        if fault is not None:
            raise fault
        digest = {"recipe_sha256": recipe_sha256(recipe)} if self.signed else {}
        (out / "summary.json").write_text(json.dumps({**SUMMARY, **digest}))
        (out / "curves.png").write_bytes(b"")
        (out / "adapter").mkdir(exist_ok=True)
        return SimpleNamespace(summary=SUMMARY, folder=out, adapter=out / "adapter")

    def talk(self, folder: Path, **settings: Any) -> Any:
        self.calls.append({"talk": {key: value for key, value in settings.items() if value is not None}})
        names = ("bare model", "this run")
        return SimpleNamespace(
            kind="chat", answer=lambda text: (text.upper(), text[::-1]), settings="greedy", names=names
        )

    def export(self, folder: Path, *, merge: bool, out: Path | None, client: str | None) -> Path:
        self.calls.append({"merge": merge, "out": out})
        return out or folder / "merged"

    def run_node(self, recipe: Path, state: Path, data: Path | None) -> None:
        self.calls.append({"recipe": recipe, "state": state, "data": data})


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    import lichen.recipes

    fake = Build()
    for module in ("lichen.recipes.run", "lichen.recipes.quantize.export"):
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(lichen.recipes, "run", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE, encoding="utf-8")
    return fake


def test_the_commands_and_their_flags_are_pinned() -> None:
    flags = {}
    for command in (
        "list",
        "fetch",
        "init",
        "card",
        "plan",
        "run",
        "compare",
        "try",
        "report",
        "export",
        "cache",
        "node",
        "piece",
        "rank",
    ):
        found = cli.app[command].assemble_argument_collection(default_parameter=cli.app.default_parameter)
        flags[command] = sorted(name for argument in found for name in argument.names)
    assert flags == {
        "list": ["--json", "WHAT"],
        "fetch": ["NAME"],
        "init": [
            *("--client", "--completion", "--full", "--label", "--model", "--no-card", "--out", "--prompt"),
            *("--task", "--text"),
            "DATA",
        ],
        "card": ["--croissant", "--write", "ROWS"],
        "plan": ["--json", "--set", "-s", "RECIPE"],
        "run": ["--json", "--out", "--quiet", "--resume", "--set", "-s", "RECIPE"],
        "compare": ["--json", "--minutes", "--only", "--out", "--quiet", "--seeds", "--set", "-s", "RECIPES"],
        "try": [
            *("--delay", "--hosts", "--max-new-tokens", "--model", "--proxy", "--repetition-penalty", "--seed"),
            *("--temperature", "--time", "--top-p"),
            "FOLDER",
            "TEXTS",
        ],
        "report": ["--clients", "--json", "FOLDERS"],
        "export": ["--bits", "--client", "--gate", "--gguf", "--merge", "--out", "--quantize", "--student", "FOLDER"],
        "cache": ["--clear", "--json", "--verify", "--yes"],
        "node": ["--data", "--recipe", "--state"],
        "piece": ["--host", "--hosts", "FOLDER"],
        "rank": ["FOLDER"],
    }


def test_help_is_quick_and_pulls_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "pydantic", "yaml", "matplotlib", "numpy", "sklearn", "pyarrow", "lichen.data"]
    code = f"import sys; from lichen.cli import main; main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - start)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "node" not in done.stdout
    assert best < 0.5 * 4, "0.3 s on a quiet machine; the bound leaves room for a busy one"


@pytest.mark.parametrize(
    "words", [["list"], ["list", "methods"], ["init", "rows.jsonl"], ["report", "runs/none"], ["cache"]]
)
def test_commands_that_train_nothing_never_load_torch(words: list[str], tmp_path: Path) -> None:
    rows = [json.dumps({"client": f"c{i % 4}", "text": f"Thing {i} is fine.", "label": i % 2}) for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    code = f"import sys; from lichen.cli import main; code = main({words}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"{2 if 'report' in words else 0} False", done.stderr


def test_a_run_ends_with_its_table_and_paths(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "r.yaml", "-s", "seed=7", "--set", "optimizer.lr=[1e-3,2e-3]"]) == 0
    (call,) = build.calls
    assert (call["out"], call["resume"]) == (Path("runs/small-1"), False)
    assert (call["recipe"].seed, call["recipe"].optimizer.lr) == (7, (1e-3, 2e-3))
    out, err = capsys.readouterr()
    for words in ("federated", "15", "runs/small-1/curves.png", "runs/small-1/adapter", "lichen try runs/small-1"):
        assert words in out
    assert "a library prints" not in out
    assert "working" in err
    assert cli.main(["run", "r.yaml"]) == 0
    assert build.calls[-1]["out"] == Path("runs/small-2")


def test_json_stands_alone(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "r.yaml", "--json", "--quiet", "--out", "x"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == SUMMARY
    assert err == "a library prints\n"


def test_resume_takes_the_folders_own_recipe(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "r.yaml", "--out", "x"]) == 0
    assert cli.main(["run", "--resume", "x"]) == 0
    assert build.calls[-1]["resume"]
    assert build.calls[-1]["recipe"].name == "small"
    capsys.readouterr()
    assert cli.main(["run", "r.yaml", "--out", "x"]) == 2
    assert "lichen run --resume x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run"], "no recipe"),
        (["run", "nosuch"], "nosuch: no such recipe"),
        (["run", "r.yaml", "-s", "optimzer.lr=1"], "did you mean 'optimizer'"),
        (["run", "r.yaml", "--resume", "x"], "leave out RECIPE"),
        (["run", "--resume", "nosuch"], "has no recipe.yaml"),
        (["run", "r.yaml", "--out", "r.yaml"], "is a file"),
        (["run", "r.yaml", "--fast"], "--fast"),
        (["run", "r.yaml", "--no-json"], "--no-json"),
        (["dance"], "dance"),
        (["report"], "name the folders"),
        (["report", "nosuch"], "is not a run's folder"),
        (["init", "nosuch.csv"], "no such file"),
        (["init", "r.yaml", "--out", "r.yaml"], "exists already"),
        (["fetch", "chitcat"], "chitcat"),
        (["try"], "FOLDER"),
        (["compare"], "no recipe"),
        (["compare", "nosuch"], "nosuch: no such recipe"),
        (["compare", "r.yaml", "--seeds", "0,x"], "--seeds: '0,x' is no list of seeds"),
        (["compare", "r.yaml", "--seeds", "1,1"], "must be different whole numbers"),
        (["compare", "r.yaml", "--only", "large"], "--only: no method 'large'"),
        (["compare", "r.yaml", "--minutes", "0"], "--minutes: 0.0 is no time"),
        (["compare", "r.yaml", "-s", "seed=1"], "every method runs with the same seeds"),
        (["compare", "r.yaml", "--out", "r.yaml"], "r.yaml: is a file"),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(
    build: Build, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert "fix: " in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 2
    assert build.calls == []


def test_a_fault_of_the_input_found_late(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    build.fault = lambda: LichenError("no such column", where="data.columns.text", fix="use body")
    assert cli.main(["run", "r.yaml", "--quiet"]) == 2
    assert capsys.readouterr().err.endswith("data.columns.text: no such column\n  fix: use body\n")


def test_ctrl_c_says_how_to_go_on(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    build.fault = KeyboardInterrupt
    assert cli.main(["run", "r.yaml", "--out", "a b"]) == 130
    assert "stopped; go on with: lichen run --resume 'a b'" in capsys.readouterr().err


def test_a_crash_keeps_its_traceback_in_a_file(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    build.fault = lambda: RuntimeError("boom\nsecond line")
    assert cli.main(["run", "r.yaml", "--out", "x", "--quiet"]) == 1
    err = capsys.readouterr().err.removeprefix("a library prints\n")
    assert err == "lichen failed: RuntimeError: boom (the traceback is in x/crash.txt)\n"
    assert "Traceback" in Path("x/crash.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str], *, begun: bool) -> None:
    if begun:
        (tmp_path / "recipe.yaml").write_text("task: chat")
    assert crash(OSError(errno.ENOSPC, "No space left on device"), tmp_path) == 2
    then = f", then go on with: lichen run --resume {tmp_path}" if begun else ""
    assert capsys.readouterr().err == f"{tmp_path}: the disk is full\n  fix: make room{then}\n"
    assert not (tmp_path / "crash.txt").exists()


def test_a_full_disk_says_what_goes_on_with_a_submitted_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("task: chat")
    full = OSError(errno.ENOSPC, "No space left on device")
    assert crash(full, tmp_path, command="lichen submit --federation trial") == 2
    then = f"make room, then go on with: lichen submit --federation trial --resume {tmp_path}"
    assert capsys.readouterr().err == f"{tmp_path}: the disk is full\n  fix: {then}\n"


COMPARISON = "base: r.yaml\nmethods:\n  small:\n  large: {federation.rounds: 20}\n"


def test_a_comparison_ends_with_its_table(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(COMPARISON, encoding="utf-8")
    build.signed = True
    assert cli.main(["compare", "c.yaml", "--seeds", "0,5", "-s", "federation.local_steps=2", "--quiet"]) == 0
    seen = [(c["recipe"].name, c["recipe"].seed, c["recipe"].federation.local_steps) for c in build.calls]
    assert seen == [("small", 0, 2), ("large", 0, 2), ("small", 5, 2), ("large", 5, 2)]
    out, err = capsys.readouterr()
    for words in ("perplexity", "15 ± 0", "small", "large", "lower is better", "runs/compare-c/compare.md"):
        assert words in out
    assert set(err.splitlines()) == {"a library prints"}


def test_a_comparison_as_json_in_sittings(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(COMPARISON, encoding="utf-8")
    words = ["compare", "c.yaml", "--seeds", "0", "--json", "--out", "x"]
    assert cli.main([*words, "--minutes", "0.0000001"]) == 0
    out, err = capsys.readouterr()
    assert [row["seeds"] for row in json.loads(out)["rows"]] == [[], []]
    assert err.endswith("2 of 2 runs are left: the same command goes on\n")
    build.fault = KeyboardInterrupt
    assert cli.main([*words, "--only", "large"]) == 130
    assert capsys.readouterr().err.endswith("stopped; what is finished is kept: the same command goes on\n")
    build.fault = lambda: LichenError("no such column", where="data.columns.text", fix="use body")
    assert cli.main(words) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["faults"] for row in rows] == [["seed 0: data.columns.text: no such column"]] * 2


def test_init_writes_a_recipe_that_reads(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    from lichen.recipes.schema.read import read_recipe

    Path("rows.jsonl").write_text('{"user": "a", "text": "hello"}\n{"user": "b", "text": "hi"}\n', encoding="utf-8")
    assert cli.main(["init", "rows.jsonl", "--out", "new/mine.yaml"]) == 0
    assert read_recipe("new/mine.yaml").data.columns == {"client": "user", "text": "text"}
    assert "lichen run new/mine.yaml" in capsys.readouterr().err


def test_init_takes_what_the_user_says(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    from lichen.recipes.schema.read import read_recipe

    row = {"what": "say it in French", "given": "good day to you", "told": "bonjour", "who": "a"}
    Path("rows.jsonl").write_text(
        "".join(json.dumps({**row, "who": "ab"[i % 2]}) + "\n" for i in range(9)), encoding="utf-8"
    )
    words = [*("--prompt", "what", "--prompt", "given", "--completion", "told"), *("--client", "who")]
    words += ["--model", "org/name", "--task", "chat"]
    assert cli.main(["init", "rows.jsonl", *words]) == 0
    recipe = read_recipe("recipe.yaml")
    assert recipe.data.columns == {
        "client": "who",
        "prompt": ("what", "given"),
        "completion": "told",
    }
    assert (recipe.model.name, recipe.task) == ("org/name", "chat")
    assert "prompt     what + given" in capsys.readouterr().err


def test_init_asks_at_a_terminal(
    build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from lichen.recipes.schema.read import read_recipe

    rows = [{"words": f"some words, number {i}", "mood": "ab"[i % 2], "wing": "xy"[i % 2]} for i in range(9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    typed = io.StringIO("7\n2\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["init", "rows.jsonl"]) == 0
    assert read_recipe("recipe.yaml").data.columns == {"text": "words", "label": "wing"}
    err = capsys.readouterr().err
    for words in ("Which column is the label?", "  2  wing (2 classes)", "a number from 1 to 3"):
        assert words in err
    assert cli.main(["init", "rows.jsonl", "--out", "other.yaml"]) == 130
    assert not Path("other.yaml").exists()


def test_list_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from lichen.data.sources.catalog import CATALOG

    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name, entry in CATALOG.items():
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [name] and entry.summary in line)
        assert entry.licence in line
    assert "…" not in out


def test_try_shows_both_answers(
    build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["try", "x", "hello", "two words"]) == 0
    assert capsys.readouterr().out == (
        "bare model: HELLO\nthis run:   olleh\n\nbare model: TWO WORDS\nthis run:   sdrow owt\n\n"
    )
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\n  cd \n"))
    assert cli.main(["try", "x"]) == 0
    assert capsys.readouterr().out.count("bare model") == 2
    assert build.calls[-1] == {"talk": {}}
    assert cli.main(["try", "x", "a", "--temperature", "0.7", "--max-new-tokens", "5", "--seed", "3"]) == 0
    assert build.calls[-1] == {"talk": {"temperature": 0.7, "max_new_tokens": 5, "seed": 3}}
    assert "asked: greedy" in capsys.readouterr().err


def test_try_by_proxy_shows_four_answers_and_is_for_runs_alone(
    build: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lichen.recipes.local

    fake = ModuleType("lichen.recipes.local.proxy_talk")

    def talk_by_proxy(folder: Path, proxy: str, *, say: Any, **settings: Any) -> Any:
        say(f"asks {proxy}")
        names = ("bare model", "this run", "big model", "proxy")
        return SimpleNamespace(answer=lambda text: [text * i for i in (1, 2, 3, 4)], settings="greedy", names=names)

    fake.talk_by_proxy = talk_by_proxy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lichen.recipes.local.proxy_talk", fake)
    monkeypatch.setattr(lichen.recipes.local, "proxy_talk", fake, raising=False)
    assert cli.main(["try", "x", "a", "--proxy", "large"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "bare model: a\nthis run:   aa\nbig model:  aaa\nproxy:      aaaa\n\n"
    assert "asks large" in shown.err
    assert not build.calls
    Path("whole").mkdir()
    Path("whole/config.json").write_text("{}", encoding="utf-8")
    for words, reason in ((["x", "--time"], "is not timed"), (["whole"], "needs the model before it was")):
        assert cli.main(["try", *words, "a", "--proxy", "large"]) == 2
        assert f"--proxy: {reason}" in capsys.readouterr().err


def test_report_prints_tables_or_json(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x", "y"):
        cli.main(["run", "r.yaml", "--out", name, "--quiet"])
    capsys.readouterr()
    assert cli.main(["report", "x", "y", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [SUMMARY, SUMMARY]
    assert cli.main(["report", "x"]) == 0
    assert "worst decile" in capsys.readouterr().out
    assert cli.main(["report", "x", "y"]) == 0
    assert capsys.readouterr().out.count("15 / 30") == 2


def test_export_and_node_pass_their_words_on(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "x", "--merge", "--out", "m"]) == 0
    assert build.calls[-1] == {"merge": True, "out": Path("m")}
    assert capsys.readouterr().out == "m\n"
    assert cli.main(["node", "--recipe", "r.yaml", "--state", "s"]) == 0
    assert build.calls[-1] == {"recipe": Path("r.yaml"), "state": Path("s"), "data": None}
    assert cli.main(["node", "--recipe", "r.yaml", "--state", "s", "--data", "mine.csv"]) == 0
    assert build.calls[-1] == {"recipe": Path("r.yaml"), "state": Path("s"), "data": Path("mine.csv")}


def test_a_reader_that_leaves_is_no_fault(tmp_path: Path) -> None:
    code = "import sys; from lichen.cli import main; sys.exit(main(['list']))"
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.close()
    _, err = worker.communicate(timeout=30)
    assert err == b""
    assert worker.returncode == 0


def test_a_run_that_learned_nothing_says_so_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["-s", "federation.rounds=2", "-s", "compare.baselines=[]"]
    assert cli.main(["run", "digits", *few, "-s", "optimizer.lr=[1e30, 1e35]", "--out", "bad"]) == 3
    out, err = capsys.readouterr()
    told = "federated: no client's training counts in any round at 1e+30, 1e+35: the model is as it began"
    assert err.count("NOTHING LEARNED: no client's training counts") == 4
    assert f"NOTHING LEARNED: {told}" in err
    assert "NOTHING LEARNED" in out
    assert json.loads(Path("bad/summary.json").read_text(encoding="utf-8"))["failures"] == [told]
    assert cli.main(["run", "--resume", "bad", "--quiet"]) == 3
    assert told in capsys.readouterr().out
    assert cli.main(["run", "digits", *few, "-s", "optimizer.lr=[1e30, 0.3]", "--out", "mixed"]) == 0
    out, err = capsys.readouterr()
    assert "NOTHING LEARNED" not in out
    summary = json.loads(Path("mixed/summary.json").read_text(encoding="utf-8"))
    assert (summary["failures"], summary["extra"]["lr.federated.failed"]) == ([], "1e+30")
    assert cli.main(["compare", "digits", *few, "-s", "optimizer.lr=[1e30]", "--seeds", "0", "--out", "page"]) == 1
    assert told.replace("1e+30, 1e+35", "1e+30") in capsys.readouterr().out


def test_children_of_tests_stay_warm_after_a_command_in_this_process() -> None:
    # Else every child of a later test imports torch again, which no test would notice but the clock.
    # What tests before this one in the same process have set is not the command's.
    before = dict(os.environ)
    assert cli.main(["--version"]) == 0
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert all(name.startswith(MAY_DIFFER) for name in {*changed, "GOMP_SPINCOUNT"})
