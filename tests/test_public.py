"""The commands in Python give what the commands give: ``lichen.plan``, ``compare`` and ``report`` beside the line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import lichen
from lichen import cli

SHORT = ("federation.rounds=1", "compare.baselines=[]", "data.partition.clients=3")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[lichen.Result, str]:
    """A run of a comparison of one recipe, and the text of the comparison."""
    folder = tmp_path_factory.mktemp("compared")
    done = lichen.compare("digits", overrides=SHORT, seeds=(5,), out=str(folder / "c"))
    assert (done.cells, done.left, done.failed) == (1, 0, 0)
    (run,) = (folder / "c").glob("digits-*/seed-5")
    return lichen.report(str(run)).runs[0], str(done)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_every_name_has_a_line_and_leads_somewhere() -> None:
    lines = re.findall(r"^- ``(\w+)``: .*$", str(lichen.__doc__), re.M)
    # These are named in the line of the function that gives them.
    assert sorted([*lines, "Result", "RunReport", "Recipe"]) == sorted(lichen.__all__)
    assert all(getattr(lichen, name) is not None for name in lichen.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lichen.nothing  # noqa: B018


def test_a_comparison_is_what_the_command_shows(
    compared: tuple[lichen.Result, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, text = compared
    out = str(run.folder.parent.parent)
    shown = printed(
        capsys, "compare", "digits", *(w for key in SHORT for w in ("-s", key)), "--seeds", "5", "--out", out, "--quiet"
    )
    assert shown.startswith(f"{text}\n")
    assert "accuracy" in text


def test_a_report_is_what_the_command_shows(
    compared: tuple[lichen.Result, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = compared
    folder = str(run.folder)
    assert printed(capsys, "report", folder) == f"{lichen.report(folder)}\n"
    both = lichen.report(folder, Path(folder))
    assert printed(capsys, "report", folder, folder) == f"{both}\n"
    assert [one.summary for one in both.runs] == json.loads(printed(capsys, "report", folder, folder, "--json"))
    assert [row["client"] for row in run.clients()] == ["client-000", "client-001", "client-002"]
    with pytest.raises(lichen.LichenError, match="no folder"):
        lichen.report()
    with pytest.raises(lichen.LichenError):
        lichen.report(run.folder.parent)


def test_a_plan_is_what_the_command_shows(capsys: pytest.CaptureFixture[str]) -> None:
    found = lichen.plan(lichen.read_recipe("digits", SHORT))
    shown = printed(capsys, "plan", "digits", *(w for key in SHORT for w in ("-s", key)))

    def counted(text: str) -> list[str]:
        """Lines of what is counted and not measured."""
        return [line for line in text.splitlines() if re.match(r"\s*(parameters|clients|sent|runs on)", line)]

    assert counted(str(found)) == counted(shown)
    assert len(counted(shown)) >= 5
    assert found.expected.clients == 3


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(lichen.LichenError, match="no method 'other'"):
        lichen.compare("digits", only=["other"], out=tmp_path / "c")
    with pytest.raises(lichen.LichenError, match="minutes"):
        lichen.compare("digits", minutes=0, out=tmp_path / "c")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(lichen.LichenError, match="several ranks"):
        lichen.compare("digits", out=tmp_path / "c")
    assert not (tmp_path / "c").exists()
