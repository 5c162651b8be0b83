"""The nearest card speaks for a file, a digest follows the bytes and names of rows, and no card is a file of data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from lichen.core.errors import LichenError
from lichen.data.cards.card_files import card_place, covered_by, rows_sha256
from lichen.data.sources.files import data_files, read_notes
from lichen.data.sources.records import load_records


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")


def test_the_nearest_card_speaks_for_a_file(tmp_path: Path) -> None:
    put(tmp_path, "alice.jsonl", "bob.jsonl", "site0/a.jsonl", "site0/b.jsonl", "site1/c.jsonl")
    put(tmp_path, "card.yaml", "alice.card.yaml", "site0/card.yaml", "site0/b.card.yaml")
    found = {
        str(one.card.relative_to(tmp_path)): (one.rows, [str(file.relative_to(tmp_path)) for file in one.files])
        for one in covered_by(tmp_path)
        if one.card is not None
    }
    assert found == {
        "alice.card.yaml": (tmp_path / "alice.jsonl", ["alice.jsonl"]),
        "card.yaml": (tmp_path, ["bob.jsonl", "site1/c.jsonl"]),
        "site0/card.yaml": (tmp_path / "site0", ["site0/a.jsonl"]),
        "site0/b.card.yaml": (tmp_path / "site0/b.jsonl", ["site0/b.jsonl"]),
    }
    (tmp_path / "card.yaml").unlink()
    bare = [one for one in covered_by(tmp_path) if one.card is None]
    assert [one.owners for one in bare] == [("bob",), ("site1",)]


def test_a_file_alone_has_its_own_card_and_not_its_folders(tmp_path: Path) -> None:
    put(tmp_path, "rows.jsonl", "card.yaml")
    assert [one.card for one in covered_by(tmp_path / "rows.jsonl")] == [None]
    put(tmp_path, "rows.card.yaml")
    assert [one.card for one in covered_by(tmp_path / "rows.jsonl")] == [tmp_path / "rows.card.yaml"]


def test_files_that_differ_in_their_endings_have_cards_of_their_own(tmp_path: Path) -> None:
    put(tmp_path, "rows.jsonl", "other.csv.gz")
    assert card_place(tmp_path / "rows.jsonl") == tmp_path / "rows.card.yaml"
    assert card_place(tmp_path / "other.csv.gz") == tmp_path / "other.card.yaml"
    put(tmp_path, "rows.csv")
    assert card_place(tmp_path / "rows.jsonl") == tmp_path / "rows.jsonl.card.yaml"
    put(tmp_path, "rows.jsonl.card.yaml")
    assert {one.card for one in covered_by(tmp_path)} == {tmp_path / "rows.jsonl.card.yaml", None}


def test_cards_are_no_data_and_no_files_that_were_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "b.jsonl", "a.card.yaml", "card.yaml", "croissant.json", "recipe.yaml")
    assert [file.name for file in data_files(tmp_path)] == ["a.jsonl", "b.jsonl"]
    assert [row.text for row in load_records(str(tmp_path))] == ["a.jsonl", "b.jsonl"]
    assert read_notes(tmp_path) == ["left out, no data: recipe.yaml"]


def test_the_digest_of_a_file_is_that_of_its_bytes_and_of_a_folder_that_of_sha256sum(tmp_path: Path) -> None:
    put(tmp_path, "b.jsonl", "a/z.jsonl", "card.yaml")
    first = hashlib.sha256((tmp_path / "b.jsonl").read_bytes()).hexdigest()
    second = hashlib.sha256((tmp_path / "a/z.jsonl").read_bytes()).hexdigest()
    assert rows_sha256(tmp_path / "b.jsonl") == first
    lines = f"{second}  a/z.jsonl\0{first}  b.jsonl\0"
    assert rows_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    before = rows_sha256(tmp_path)
    put(tmp_path, "card.yaml", "x.card.yaml", "notes.md")
    assert rows_sha256(tmp_path) == before
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert rows_sha256(tmp_path) != before


def test_files_that_are_left_out_leave_others_their_clients(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "b.jsonl")
    files: dict[str, set[Path]] = {}
    out = {tmp_path / "b.jsonl"}
    rows = load_records(str(tmp_path), path_client="auto", but=out, client_files=files)
    assert [row.client for row in rows] == ["a"]
    assert files == {"a": {tmp_path / "a.jsonl"}}


def test_rows_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match=r"no data files|cannot be read"):
        rows_sha256(tmp_path)
    with pytest.raises(LichenError, match="cannot be read"):
        rows_sha256(tmp_path / "none.csv")
