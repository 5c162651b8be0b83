"""What is asked of ``lichen forget`` is read and checked before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.roster import Member, Roster
from lichen.recipes.schema.yaml import dump_yaml
from lichen.recipes.withdrawal import request as module
from lichen.recipes.withdrawal.request import read_request, require_same_command, roster_in


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for a finished run of two wards."""
    roster = Roster(tuple(Member(name=name, rows={"train": 3}) for name in ("ward-3", "ward-7")))
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "roster.json").write_text(json.dumps(roster.dump()), encoding="utf-8")
    monkeypatch.setattr(module, "read_summary", lambda _: {})
    return folder


def test_a_request_names_the_client_and_its_place_in_the_roster(finished: Path) -> None:
    found = read_request(finished, "ward-7", "replay")
    assert (found.number, found.out.name, found.folder) == (1, "old-without-ward-7", finished)
    assert read_request(finished, "ward-3", "npo", finished.parent / "new").number == 0


def test_runs_of_several_runs_are_refused_with_what_to_name(finished: Path) -> None:
    page = {"task": "chat", "model": {"name": "m"}, "data": {"name": "rows.jsonl"}, "federation": {"local_steps": 1}}
    text = dump_yaml({**page, "stream": {"by": "month"}})
    (finished / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LichenError, match="is of a stream"):
        read_request(finished, "ward-7", "replay")
    text = dump_yaml(
        {**page, "stages": [{"name": "one", "federation.rounds": 2}, {"name": "two", "federation.rounds": 3}]}
    )
    (finished / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LichenError, match="several stages"):
        read_request(finished, "ward-7", "replay")


def test_what_does_not_fit_is_refused_by_its_place(finished: Path) -> None:
    full = finished.parent / "full"
    full.mkdir()
    (full / "file").touch()
    for arguments, where, part in (
        (("ward7", "replay"), "--client", "json: ward-3, ward-7"),
        (("ward-7", "shred"), "--how", "use one of: subtract, replay"),
        (("ward-7", "replay", finished / "new"), "--out", "lies in the old run"),
        (("ward-7", "replay", full), "--out", "is not empty"),
    ):
        with pytest.raises(LichenError, match=part) as refused:
            read_request(finished, *arguments)
        assert refused.value.where.startswith(where)


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "is damaged"), ("[1]", "no roster of format"), ("[" * 100_000, "is damaged"), (None, "has no roster")],
)
def test_a_roster_that_is_damaged_or_missing_is_one_sentence(finished: Path, text: str | None, what: str) -> None:
    file = finished / "roster.json"
    file.unlink() if text is None else file.write_text(text, encoding="utf-8")
    with pytest.raises(LichenError, match=what):
        roster_in(finished)
    with pytest.raises(LichenError, match="has no roster"):
        roster_in(finished / "roster.json")  # no folder


@pytest.mark.parametrize("flags", [[], ["--how", "replay"], ["--list"], ["--purge"]])
def test_what_is_no_run_is_said_to_be_none(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is not taken for a recipe's name."""
    what = "is not a run's folder" if not flags or flags[0] == "--how" else "has no roster.json"
    for place in (tmp_path, tmp_path / "none"):
        assert cli.main(["forget", str(place), "--client", "ada", *flags]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"{place}: {what}" in error
        assert "fix: name " in error
        assert "gallery" not in error


def test_only_the_same_command_goes_on(tmp_path: Path) -> None:
    assert not require_same_command(tmp_path, "name: one\n")
    (tmp_path / "recipe.yaml").write_text("name: one\n", encoding="utf-8")
    assert require_same_command(tmp_path, "name: one\n")
    with pytest.raises(LichenError, match="begun by another command"):
        require_same_command(tmp_path, "name: two\n")


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--list", "--purge"], "--list and --purge: look, or take out"),
        (["--rows", "rows.csv"], "--rows: does nothing here fix: add --list"),
        (["--basis", "a law"], "--basis: does nothing here fix: add --purge"),
        (["--every", "3"], "--every: does nothing here fix: add --how eraser, negate or npo"),
        (["--purge", "--every", "3"], "--every: does nothing here fix: add --how eraser, negate or npo"),
        (["--list", "--out", "new"], "--out: does nothing here fix: leave it out"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(
    flags: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["forget", str(tmp_path), "--client", "ada", *flags]) != 0
    assert what in " ".join(capsys.readouterr().err.split())
