"""``lichen card`` and what ``lichen init`` writes beside data: a card to be filled in, checked, and as Croissant."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lichen import cli
from lichen.data.cards.card_files import rows_sha256
from lichen.recipes.rows.data_card import DataCard, card_text, read_card

FILLED = DataCard(
    owner="Clinic North",
    source="https://example.org/rows",
    licence="CC-BY-4.0",
    consent="public_task",
    purposes=("research",),
    until="2999-12-31",
    contact="data@example.org",
)


def put(file: Path, rows: int = 20) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{file.stem} says this {n}", "label": "ab"[n % 2]}) for n in range(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def fill(rows: Path, place: Path, **more: Any) -> None:
    place.write_text(card_text(FILLED.model_copy(update={"rows_sha256": rows_sha256(rows), **more})), encoding="utf-8")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_init_writes_a_card_once_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = put(tmp_path / "rows.jsonl")
    assert cli.main(["init", str(rows)]) == 0
    assert f"wrote {tmp_path / 'rows.card.yaml'}, a data card" in capsys.readouterr().err
    assert read_card(tmp_path / "rows.card.yaml")[0] == DataCard(rows_sha256=rows_sha256(rows))
    (tmp_path / "rows.card.yaml").write_text("owner: me", encoding="utf-8")
    assert cli.main(["init", str(rows), "--out", "two.yaml"]) == 0
    assert "data card" not in capsys.readouterr().err
    assert (tmp_path / "rows.card.yaml").read_text(encoding="utf-8") == "owner: me"


def test_init_writes_one_card_into_a_folder_unless_a_file_has_one(tmp_path: Path) -> None:
    put(tmp_path / "people/a.jsonl"), put(tmp_path / "people/b.jsonl")
    assert cli.main(["init", "people", "--no-card"]) == 0
    assert not (tmp_path / "people/card.yaml").exists()
    fill(tmp_path / "people/a.jsonl", tmp_path / "people/a.card.yaml")
    assert cli.main(["init", "people", "--out", "two.yaml"]) == 0
    assert not (tmp_path / "people/card.yaml").exists()
    (tmp_path / "people/a.card.yaml").unlink()
    assert cli.main(["init", "people", "--out", "three.yaml"]) == 0
    assert (tmp_path / "people/card.yaml").exists()
    assert sorted(file.name for file in (tmp_path / "people").iterdir()) == ["a.jsonl", "b.jsonl", "card.yaml"]


def test_a_folder_that_cannot_be_written_gets_a_recipe_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = put(tmp_path / "rows.jsonl")
    (tmp_path / "rows.card.yaml").symlink_to(tmp_path / "nowhere" / "card.yaml")
    assert cli.main(["init", str(rows)]) == 0
    assert (tmp_path / "recipe.yaml").exists()
    assert (tmp_path / "rows.card.yaml").is_symlink()
    assert "a data card" not in capsys.readouterr().err


def test_a_card_is_checked_against_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, place = put(tmp_path / "rows.jsonl"), tmp_path / "rows.card.yaml"
    for change, said in (
        (lambda: None, "has no data card"),
        (lambda: place.write_text("owner: 3"), "must be a text"),
        (lambda: fill(rows, place, owner=None), "owner is not filled in"),
        (lambda: fill(rows, place, until="2020-01-31"), "ended on 2020-01-31"),
        (lambda: fill(rows, place, rows_sha256="0" * 64), "changed after the card was written"),
    ):
        change()
        assert cli.main(["card", str(rows)]) == 2
        shown = capsys.readouterr()
        assert said in shown.out
        assert said in shown.err
    fill(rows, place)
    assert cli.main(["card", str(rows)]) == 0
    out = capsys.readouterr().out
    assert [word in out for word in ("Clinic North", "CC-BY-4.0", "public_task", "research", "whole")] == [True] * 5
    put(rows, rows=21)
    assert cli.main(["card", str(rows)]) == 2
    assert cli.main(["card", str(rows), "--write"]) == 0
    assert cli.main(["card", str(rows)]) == 0
    assert read_card(place)[0] == FILLED.model_copy(update={"rows_sha256": rows_sha256(rows)})


def test_every_card_of_a_folder_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / "people" / f"{name}.jsonl")
    fill(tmp_path / "people/a.jsonl", tmp_path / "people/a.card.yaml", owner="Ann")
    fill(tmp_path / "people/b.jsonl", tmp_path / "people/b.card.yaml", owner="Bob", rows_sha256="0" * 64)
    assert cli.main(["card", "people"]) == 2
    shown = capsys.readouterr()
    assert ["Ann" in shown.out, "Bob" in shown.out, "client 'c' has no data card" in shown.out] == [True] * 3
    assert "(and 1 more)" in shown.err


def test_a_card_as_croissant_has_what_the_specification_requires(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "people/a.jsonl"), put(tmp_path / "people/b/c.jsonl")
    fill(tmp_path / "people", tmp_path / "people/card.yaml")
    assert cli.main(["card", "people", "--croissant"]) == 0
    found = json.loads(capsys.readouterr().out)
    required = {"@context", "@type", "name", "description", "license", "url", "creator", "datePublished"}
    assert required <= found.keys()
    assert found["@type"] == "sc:Dataset"
    assert "http://mlcommons.org/croissant/1.0" in found["conformsTo"]
    assert found["@context"]["conformsTo"] == "dct:conformsTo"
    assert found["license"] == "https://spdx.org/licenses/CC-BY-4.0"
    assert found["creator"]["name"] == "Clinic North"
    assert found["rai:dataUseCases"] == ["research"]
    assert "public task" in found["rai:personalSensitiveInformation"][0]
    files = {one["@id"]: one for one in found["distribution"]}
    assert files.keys() == {"a.jsonl", "b/c.jsonl"}
    for name, one in files.items():
        assert {"@type", "@id", "name", "contentUrl", "encodingFormat", "sha256"} <= one.keys()
        assert one["@type"] == "cr:FileObject"
        assert one["sha256"] == hashlib.sha256((tmp_path / "people" / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"owner": None}, "owner is not filled in"),
        ({"licence": None}, "licence"),
        ({"rows_sha256": "0" * 64}, "changed"),
    ],
)
def test_no_croissant_is_printed_of_a_card_that_does_not_say_enough(
    more: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = put(tmp_path / "rows.jsonl")
    fill(rows, tmp_path / "rows.card.yaml", **more)
    assert cli.main(["card", str(rows), "--croissant"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
