"""A stream looks for drift before it trains on a period: rows that are others are seen, and what was found stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


def dated(file: Path, months: tuple[str, ...], changed: str = "") -> Path:
    """Rows in which everybody begins with the same word, three times, in one of the months."""
    save_dated(file, months)
    words = file.read_text(encoding="utf-8").split('"ask": "')[1].split()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if changed and line["when"].startswith(changed):
            line["ask"], line["reply"] = (f"{words[0]} {words[0]} {words[0]} {x}" for x in (line["ask"], line["reply"]))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def found(folder: Path) -> list[Any]:
    return [one["drift"] for one in json.loads((folder / "periods.json").read_text(encoding="utf-8"))["periods"]]


def test_other_rows_are_seen_and_only_then_a_period_begins_from_the_start(model: Path, tmp_path: Path) -> None:
    data = dated(tmp_path / "rows.jsonl", MONTHS, changed=MONTHS[2])
    recipe = stream(model, data, stream={"detect": "mmd", "react": "restart"}, federation={"rounds": 1})
    lichen.run(read_recipe(recipe), out=tmp_path / "run")
    first, *rest = found(tmp_path / "run")
    assert first is None
    assert [one["alarm"] for one in rest] == [False, True, True]  # and back again
    assert all(0 < one["p"] <= 1 for one in rest)
    begins = []
    for month in MONTHS:
        own = read_recipe(tmp_path / "run" / "periods" / month / "recipe.yaml")
        begins.append(own.model.adapter.init_from is not None)
    assert begins == [False, True, False, False]
    before = (tmp_path / "run" / "periods.json").read_bytes()
    lichen.run(read_recipe(recipe), out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "periods.json").read_bytes() == before


@pytest.mark.parametrize("detect", ["page-hinkley", "adwin"])
def test_clients_watch_their_losses_and_go_on_when_rows_are_added(model: Path, tmp_path: Path, detect: str) -> None:
    recipe = stream(model, tmp_path / "rows.jsonl", stream={"detect": detect}, federation={"rounds": 1})
    dated(tmp_path / "rows.jsonl", MONTHS[:2])
    lichen.run(read_recipe(recipe), out=tmp_path / "run")
    before = found(tmp_path / "run")
    dated(tmp_path / "rows.jsonl", MONTHS[:3])
    lichen.run(read_recipe(recipe), out=tmp_path / "run", resume=True)
    lichen.run(read_recipe(recipe), out=tmp_path / "whole")
    after = found(tmp_path / "run")
    assert after[:2] == before
    assert after == found(tmp_path / "whole")
    assert [one["watched"] for one in after] == [3, 3, 3]
    assert not any(one["alarm"] for one in after)


def test_what_is_looked_for_in_one_period_alone_is_refused(model: Path, tmp_path: Path) -> None:
    data = dated(tmp_path / "rows.jsonl", MONTHS)
    with pytest.raises(LichenError, match="detect"):
        read_recipe(stream(model, data, stream={"detect": "mmd", "period": MONTHS[0]}))
