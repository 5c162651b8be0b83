"""What a run and a plan leave on disk: modes under any umask, and no private row in the clear outside the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import traceback_text
from lichen.data.batches import token_cache
from lichen.recipes.plan.plan import plan
from lichen.shell import crash
from support.tiny_llama import recipe, save_model

SHARED = ("adapter", "merged", "model")
SECRET = b"w17 w4"
"""Words that stand beside each other in many rows."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    save_model(folder / "model")
    rows = [
        {"who": f"p{i % 3}", "reply": f"w17 w4 w{i % 9} w{i % 7} w{i % 11}", "ask": f"w{i % 5} w{i}"} for i in range(60)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_RECORDS", 1)
    return tmp_path / "cache"


@pytest.fixture(params=[0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield int(request.param)
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def check_modes(run: Path, umask: int) -> None:
    assert mode(run) == 0o700
    seen = 0
    for path in run.rglob("*"):
        shared = path.relative_to(run).parts[0] in SHARED
        usual = (0o777 if path.is_dir() else 0o666) & ~umask
        assert mode(path) == (usual if shared else 0o700 if path.is_dir() else 0o600), path
        seen += not shared
    assert seen > 8


def test_a_chat_run_is_private_but_what_is_handed_on(home: Path, cache: Path, tmp_path: Path, umask: int) -> None:
    whole = recipe(home / "model", home / "rows.jsonl", "pair", compare={"baselines": ["base", "alone", "pooled"]})
    result = lichen.run(whole, out=tmp_path / "runs" / "one")
    lichen.export(result.folder, merge=True)
    assert mode(tmp_path / "runs") == 0o777 & ~umask
    check_modes(result.folder, umask)
    prepared = list((cache / "private" / "prepared").iterdir())
    assert prepared
    assert {mode(file) for file in prepared} == {0o600}
    assert {mode(cache / "private"), mode(cache / "private" / "prepared")} == {0o700}


def test_a_student_and_a_closed_form_head(cache: Path, tmp_path: Path, umask: int) -> None:
    few = ["federation.rounds=1", "compare.alone_epochs=1"]
    result = lichen.run(lichen.read_recipe("digits", few), out=tmp_path / "digits")
    check_modes(result.folder, umask)


def test_a_folder_that_is_there_keeps_its_mode(home: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o755)
    result = lichen.run(recipe(home / "model", home / "rows.jsonl", "pair"), out=tmp_path / "mine")
    assert mode(result.folder) == 0o755
    assert mode(result.folder / "state") == 0o700
    assert mode(result.folder / "recipe.yaml") == 0o600


def found(folder: Path, secret: bytes = SECRET) -> list[str]:
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()
    ]


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_no_private_text_lies_in_the_cache(home: Path, cache: Path, tmp_path: Path, size: int) -> None:
    """Neither after a run nor after a plan, of a small file or of one so large that public ones are kept parsed."""
    file = tmp_path / "rows.jsonl"
    lines = (home / "rows.jsonl").read_text()
    pad = "w1 " * (size // 180) + "w2"
    file.write_text("".join(json.dumps(json.loads(line) | {"ask": pad}) + "\n" for line in lines.splitlines()))
    assert SECRET in file.read_bytes()
    assert file.stat().st_size >= size
    whole = recipe(home / "model", file, "pair")
    plan(lichen.read_recipe(whole), seconds=0.05)
    assert {path.parent.name for path in cache.rglob("*") if path.is_file()} == {"findings"}, "of the model alone"
    assert found(cache) == []
    result = lichen.run(whole, out=tmp_path / "run")
    assert list((cache / "private" / "prepared").iterdir()), "token ids are kept"
    assert found(cache) == []
    assert found(result.folder) == []


def test_a_plan_draws_a_model_from_private_words_elsewhere(cache: Path, tmp_path: Path) -> None:
    words = [f"the {a} {b}" for a in ("old", "new", "big") for b in ("cat", "dog", "hen")]
    rows = [{"client": who, "text": " ".join(words[k:] + words[:k])} for who in ("ann", "bob") for k in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole: dict[str, Any] = {
        "task": "chat",
        "model": {"scratch": {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2}, "adapter": {"kind": "full"}},
        "data": {"name": str(tmp_path / "rows.jsonl"), "form": "stream", "max_length": 16},
        "federation": {"rounds": 1, "local_steps": 1},
        "compare": {"baselines": []},
    }
    plan(lichen.read_recipe(whole), seconds=0.05)
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    lichen.run(whole, out=tmp_path / "run")
    (drawn,) = (cache / "private").glob("scratch-*")
    assert {mode(drawn)} | {mode(file) for file in drawn.iterdir()} == {0o700, 0o600}


def test_a_crash_file_holds_no_values_of_variables_and_no_long_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = "the patient said " + "that it hurts, " * 40 + "and her name is Ann Example"

    def fail() -> None:
        text = row
        raise ValueError(text)

    caught: list[Exception] = []
    for cause in (None, KeyError(row)):
        try:
            try:
                fail()
            except ValueError as error:
                raise RuntimeError(f"cannot read {row}") from (cause or error)
        except RuntimeError as error:
            caught.append(error)
    for error in caught:
        text = traceback_text(error)
        assert "in fail" in text or "KeyError" in text
        assert "Ann Example" not in text
        assert "more letters" in text
        (tmp_path / "crash.txt").write_text("old")
        (tmp_path / "crash.txt").chmod(0o644)
        assert crash(error, tmp_path) == 1
        assert mode(tmp_path / "crash.txt") == 0o600
        assert "Ann Example" not in (tmp_path / "crash.txt").read_text() + capsys.readouterr().err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert crash(caught[0], None) == 1
    (file,) = (tmp_path / "tmp").iterdir()
    assert mode(file) == 0o600
