"""The cache: what is listed is what is there, and clearing removes that and nothing else."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path

import pytest

from lichen import cli
from lichen.data.sources.cache_listing import Group, clear, items

KEY = "0123456789abcdef" * 4
OURS = {
    f"private/prepared/{KEY}.safetensors": "private",
    f"private/prepared/.{KEY}.safetensors.77.part": "private",
    "private/scratch-0123456789abcdef/model.safetensors": "private",
    "private/.scratch-0123456789abcdef.77/config.json": "private",
    f"answers/01/{KEY}.json": "private",
    f"prepared/{KEY}.safetensors": "models",
    "scratch-fedcba9876543210/model.safetensors": "models",
    "gguf-0123456789abcdef/model.safetensors": "models",
    "minilm-l6-b9a0018dff09/model.safetensors": "models",
    "chitchat-0123456789ab/raw/deep/rows.jsonl": "models",
    ".minilm-l6.abc.part/get/file.whl": "models",
}
THEIRS = (
    "thesis.txt",
    "private/diary.txt",
    "private/prepared/notes.safetensors",
    "answers/01/mine.json",
    "answers/exam/01.json",
    "prepared/lunch.txt",
    "scratch-paper/a.txt",
    "gguf-files/small.gguf",
    "minilm-l6-mine/model.safetensors",
    "my-model-0123456789ab/model.safetensors",
    ".minilm-l6.lock",
    "photos/cat.png",
)


class Screen(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    for name in (*OURS, *THEIRS):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1000)
    old = time.time() - 3 * 24 * 3600
    for path in sorted((folder / ".minilm-l6.abc.part").rglob("*"), reverse=True):
        os.utime(path, (old, old))
    os.utime(folder / ".minilm-l6.abc.part", (old, old))
    monkeypatch.setenv("LICHEN_CACHE", str(folder))
    return folder


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_everything_of_ours_is_listed_with_what_it_takes(home: Path) -> None:
    found = items()
    assert sum(one.bytes for one in found) == 1000 * len(OURS)
    assert sum(one.bytes for one in found if one.private) == 1000 * sum(of == "private" for of in OURS.values())
    assert [one.private for one in found] == sorted((one.private for one in found), reverse=True)
    assert {one.what for one in found} >= {"the model minilm-l6", "the data chitchat", "answers of foundation models"}
    assert all(path.is_relative_to(home) for one in found for path in one.paths)
    (part,) = (one for one in found if one.what == "an unfinished download")
    assert 2 * 24 * 3600 < time.time() - part.used < 4 * 24 * 3600


@pytest.mark.parametrize("group", ["private", "models", "all"])
def test_what_is_cleared_goes_and_nothing_else(home: Path, group: Group) -> None:
    goes = {name for name, of in OURS.items() if group in ("all", of)}
    assert clear(group) == 1000 * len(goes)
    assert left(home) == {*OURS, *THEIRS} - goes
    if group == "all":
        assert items() == []


def test_a_download_under_way_is_left_alone(home: Path) -> None:
    now = home / ".chitchat.new.part"
    now.mkdir()
    clear("all")
    assert now.is_dir()


def test_links_are_not_followed(home: Path, tmp_path: Path) -> None:
    clear("all")
    far = tmp_path / "far"
    for name in (f"prepared/{KEY}.safetensors", "model/model.safetensors", f"{KEY}.json", f"01/{KEY}.json"):
        (far / name).parent.mkdir(parents=True, exist_ok=True)
        (far / name).write_bytes(b"precious")
    there = left(far)
    (home / "minilm-l6-b9a0018dff09").symlink_to(far / "model")
    (home / "private" / "scratch-0123456789abcdef").symlink_to(far / "model")
    (home / "answers" / "02").symlink_to(far / "01")
    (home / "answers" / "01" / f"{KEY}.json").symlink_to(far / f"{KEY}.json")
    (home / "private" / "prepared").rename(home / "private" / "before")
    (home / "private" / "prepared").symlink_to(far / "prepared")
    clear("all")
    assert left(far) == there
    assert not (home / "minilm-l6-b9a0018dff09").is_symlink(), "a link of ours goes, what it leads to stays"
    assert (home / "private" / "prepared").is_symlink(), "a folder of ours is no link"


def test_a_cache_that_is_a_link_itself(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "link"))
    clear("all")
    assert left(home) == set(THEIRS)


def test_the_command_lists_asks_and_removes(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "the model minilm-l6" in shown
    assert str(home / "answers") in shown
    assert cli.main(["cache", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert sum(one["bytes"] for one in listed) == 1000 * len(OURS)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert cli.main(["cache", "--clear", "all"]) == 2
    assert "add --yes" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Screen("no\n"))
    assert cli.main(["cache", "--clear", "all"]) == 0
    assert left(home) == {*OURS, *THEIRS}
    monkeypatch.setattr(sys, "stdin", Screen("y\n"))
    assert cli.main(["cache", "--clear", "private"]) == 0
    assert left(home) == {*THEIRS, *(name for name, of in OURS.items() if of == "models")}
    assert cli.main(["cache", "--clear", "all", "--yes"]) == 0
    assert "removed" in capsys.readouterr().out
    assert left(home) == set(THEIRS)
    assert cli.main(["cache", "--clear", "all", "--yes"]) == 0
    assert cli.main(["cache"]) == 0
    assert "nothing lies in" in capsys.readouterr().out
    assert cli.main(["cache", "--clear", "everything"]) == 2


def test_no_cache_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "none"))
    assert items() == []
    assert clear("all") == 0
    assert not (tmp_path / "none").exists()
