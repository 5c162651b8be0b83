"""What a split does not go with is refused when the recipe is read or opened, with key and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.open_server import needs_rows
from support.split_llama import made, save_all
from support.tiny_families import FAMILIES
from support.tiny_families import made as family_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("split"))


BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("split.kind", {"engine": {"name": "distributed"}, "split": {"kind": "v2"}}),
    ("split.client", {"split": {"kind": "v2", "client": {"first": [1, 2]}}}),
    ("federation.ranks", {"split": {"kind": "v2"}, "federation": {"ranks": [2, 1], "aggregate": "flexlora"}}),
    ("wire", {"wire": {"up": ["int8"]}}),
    ("federation.aggregate", {"federation": {"aggregate": "fedex"}}),
    ("federation.aggregate", {"federation": {"aggregate": "fedsa"}}),
    ("federation.layer_groups", {"federation": {"layer_groups": 2}}),
    ("federation.weighting", {"federation": {"weighting": "rows"}}),
    ("federation.fair", {"federation": {"fair": "tilted"}}),
    ("personal", {"personal": {"kind": "ditto"}}),
    ("value", {"value": {"kind": "gtg"}}),
    ("privacy", {"privacy": {"secure": True}}),
    ("engine.clock", {"engine": {"clock": {"median": 30.0}}}),
    ("engine.gradient_checkpointing", {"engine": {"gradient_checkpointing": True}}),
    (
        "model.adapter.kind",
        {"model": {"adapter": {"kind": "ia3", "target_modules": ["k_proj"], "rank": 8, "alpha": 16}}},
    ),
    ("split.client.first", {"split": {"client": {"first": 0}}}),
    ("split.client.last", {"split": {"client": {"last": []}}}),
]


@pytest.mark.parametrize(("key", "more"), BESIDE)
def test_what_does_not_go_beside_it_is_refused_with_its_key(home: Path, key: str, more: dict[str, Any]) -> None:
    with pytest.raises(LichenError) as refused:
        read_recipe(made(home, **{"split": {}, **more}))
    assert key in f"{refused.value.where} {refused.value}"
    assert refused.value.fix


@pytest.mark.parametrize(("first", "last"), [(4, 1), (5, 5), ([1, 3], 2)])
def test_cuts_that_leave_no_middle_are_refused(home: Path, first: Any, last: int) -> None:
    with pytest.raises(LichenError, match="leave no middle of the 5") as refused:
        open_recipe(read_recipe(made(home, split={"client": {"first": first, "last": last}})))
    assert (refused.value.where, refused.value.fix) == ("split.client", "let first and last be 4 together at most")


def test_a_family_without_pieces_is_refused_with_those_there_are(home: Path, tmp_path: Path) -> None:
    assert "mistral" in FAMILIES
    family_model("mistral").save_pretrained(tmp_path / "model")
    for file in (home / "model").glob("*token*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    what = made(home, split={"client": {"first": 1, "last": 1}})
    what["model"] = {**what["model"], "name": str(tmp_path / "model")}
    with pytest.raises(LichenError, match="mistral cannot be cut into pieces") as refused:
        open_recipe(read_recipe(what))
    assert "llama" in str(refused.value.fix)


def test_sites_of_a_federation_are_not_split_yet(home: Path) -> None:
    assert [need.key for need in needs_rows(read_recipe(made(home, split={})))] == ["split"]
