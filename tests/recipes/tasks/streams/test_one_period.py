"""One period alone is the ordinary run on its rows, whatever goes with that; a whole stream goes with less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.schema.read import read_recipe
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import save_model

ALONE: dict[str, dict[str, Any]] = {
    "privacy": {"privacy": {"secure": True}},
    "personal": {"personal": {"kind": "ditto"}},
    "value": {"value": {"kind": "loo"}},
    "federation.reward": {"federation": {"reward": "cgsv", "aggregate": "mean", "weighting": "uniform"}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("period")
    save_model(home / "model")
    save_dated(home / "one.jsonl", MONTHS[:1])
    save_dated(home / "two.jsonl", MONTHS[:2])
    return home


@pytest.mark.parametrize("key", ["privacy", "personal", "value"])
def test_one_period_alone_is_the_ordinary_run_on_its_rows(home: Path, tmp_path: Path, key: str) -> None:
    one = stream(home / "model", home / "two.jsonl", stream={"period": MONTHS[0]}, **ALONE[key])
    plain = stream(home / "model", home / "one.jsonl", **ALONE[key])
    del plain["stream"]
    runs = [lichen.run(page, out=tmp_path / name) for name, page in (("one", one), ("plain", plain))]
    names = ["state/final.safetensors", "clients.csv", "roster.json"]
    names += ["contributions.json"] if key == "value" else []
    for name in names:
        assert (runs[0].folder / name).read_bytes() == (runs[1].folder / name).read_bytes(), name
    assert runs[0].summary["columns"] == runs[1].summary["columns"]
    assert ("personal" in runs[0].summary["extra_columns"]) == (key == "personal")


@pytest.mark.parametrize("key", ALONE)
def test_beside_a_whole_stream_it_is_refused_and_the_fix_names_one_period(home: Path, key: str) -> None:
    page = stream(home / "model", home / "two.jsonl", **ALONE[key])
    with pytest.raises(LichenError) as caught:
        read_recipe(page)
    assert (caught.value.where, caught.value.fix) == (key, "remove it, or train one period alone: stream.period")
    read_recipe(page, [f"stream.period={MONTHS[0]}"])


def test_noise_is_refused_beside_one_period_too(home: Path) -> None:
    noise = {"privacy": {"sigma": 1.0, "clip": 1.0}, "federation": {"weighting": "uniform"}}
    for alone in ({}, {"period": MONTHS[0]}):
        with pytest.raises(LichenError, match="what each period spends") as caught:
            read_recipe(stream(home / "model", home / "two.jsonl", stream=alone, **noise))
        assert (caught.value.where, caught.value.fix) == ("privacy", "remove it, or stream")


def test_preferences_are_learned_in_one_period_alone(home: Path) -> None:
    page = stream(home / "model", home / "two.jsonl", prefer={"kind": "spin"}) | {"task": "prefer"}
    with pytest.raises(LichenError, match="scores of several do not compare") as caught:
        read_recipe(page)
    assert (caught.value.where, caught.value.fix) == (
        "task",
        "use task: chat, or train one period alone: stream.period",
    )
    read_recipe(page, [f"stream.period={MONTHS[0]}"])
