"""``data.require``: a card is held against it before a row is read; who is refused or left out is named."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.data.cards.card_files import rows_sha256
from lichen.data.sources.entries import CATALOG
from lichen.recipes.rows.cards import cards_of, check_cards
from lichen.recipes.rows.catalogued import catalogued_card
from lichen.recipes.rows.data_card import DataCard, card_text, write_card
from lichen.recipes.rows.prepare import gather_all
from lichen.recipes.rows.public import split_public
from lichen.recipes.rows.reading import read_of
from lichen.recipes.schema.data import DataConfig, RequireConfig
from lichen.recipes.schema.recipe import Recipe

GOOD: dict[str, Any] = {"owner": "O", "licence": "MIT", "consent": "consent", "purposes": ("research",)}
STRICT = RequireConfig(licences=("MIT", "CC-BY-4.0"), purposes=("research",), consent=True)
NEW_YEAR = date(2026, 1, 1)


def put(file: Path, **card: Any) -> Path:
    """A client's file, and its card."""
    rows = [{"said": f"{file.stem} says {n}", "mood": "ab"[n % 2]} for n in range(10)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    place = file.with_name(f"{file.stem}.card.yaml")
    place.write_text(card_text(DataCard(**{"rows_sha256": rows_sha256(file), **GOOD, **card})))
    return file


def recipe_of(data: Path, require: dict[str, Any] | None, **more: Any) -> Recipe:
    plain = {"name": str(data), "columns": {"text": "said", "label": "mood"}, "require": require, **more}
    return lichen.read_recipe({"task": "classify", "model": {"name": "tiny"}, "data": plain})


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({}, None),
        ({"licence": "MIT AND CC-BY-4.0"}, None),
        ({"licence": "GPL-3.0-only OR MIT"}, None),
        ({"licence": "MIT AND GPL-3.0-only"}, "comes under MIT AND GPL-3.0-only, which data.require.licences"),
        ({"licence": None}, "licence of client 'b' is not filled in"),
        ({"owner": None}, "owner of client 'b' is not filled in"),
        ({"consent": None}, "consent of client 'b' is not filled in"),
        ({"consent": "none_needed"}, None),
        ({"purposes": ()}, "purposes of client 'b' is not filled in"),
        ({"purposes": ("training",)}, "client 'b' does not grant research"),
        ({"purposes": ("research", "training")}, None),
        ({"until": "2026-01-01"}, None),
        ({"until": "2025-12-31"}, "the data card of client 'b' ended on 2025-12-31"),
        ({"rows_sha256": None}, "rows_sha256 of client 'b' is not filled in"),
        ({"rows_sha256": "0" * 64}, "the rows of client 'b' changed after the card was written"),
    ],
)
def test_each_card_is_held_against_what_is_required(card: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "b.jsonl", **card)
    if said is None:
        assert len(check_cards(STRICT, tmp_path, today=lambda: NEW_YEAR).checked) == 2
        return
    with pytest.raises(LichenError, match=said) as caught:
        check_cards(STRICT, tmp_path, today=lambda: NEW_YEAR)
    assert caught.value.where == str(tmp_path / "b.card.yaml")
    assert caught.value.fix


def test_only_what_is_required_must_be_filled_in(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", licence=None, consent=None, purposes=())
    assert len(check_cards(RequireConfig(), tmp_path).checked) == 1
    with pytest.raises(LichenError, match="purposes of"):
        check_cards(RequireConfig(purposes=("research",)), tmp_path)


def test_a_missing_card_is_refused_with_the_command_that_writes_one(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "b.jsonl")
    (tmp_path / "b.card.yaml").unlink()
    with pytest.raises(LichenError, match="client 'b' has no data card") as caught:
        gather_all(recipe_of(tmp_path, {}))
    assert f"lichen card {tmp_path / 'b.jsonl'} --write" in caught.value.fix
    write_card(tmp_path / "b.jsonl")
    with pytest.raises(LichenError, match="owner of client 'b' is not filled in"):
        gather_all(recipe_of(tmp_path, {}))


def test_a_card_is_checked_before_a_row_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{ this is no row\n")
    with pytest.raises(LichenError, match="has no data card"):
        gather_all(recipe_of(file, {}))
    with pytest.raises(LichenError, match=r"a\.jsonl"):
        gather_all(recipe_of(file, None))


def test_rows_whose_card_has_ended_are_left_out_by_name_and_not_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / f"{name}.jsonl", until="2020-01-31" if name == "b" else None)
    (tmp_path / "b.jsonl").write_text("{ this is no row\n")
    recipe = recipe_of(tmp_path, {"expired": "leave_out"})
    gathered = gather_all(recipe)
    split = split_public(recipe, gathered.records)
    assert [one.name for one in split.clients_data] == ["a", "c"]
    (left,) = gathered.cards.left
    assert (left.rows, left.clients) == (0, 1)
    assert "ended on 2020-01-31" in left.why
    assert "b" in left.why
    assert left.__class__ is type(gathered.left[0])
    assert read_of(recipe, gathered, split, None).left[0] == left
    summary = gathered.cards.summary(["a", "c"])
    assert summary["licences"] == {"MIT": 2}
    assert [one["clients"] for one in summary["cards"]] == [1, 1]
    assert [one["clients"] for one in summary["cards_left"]] == [["b"]]
    with pytest.raises(LichenError, match="client 'b' ended on 2020-01-31"):
        gather_all(recipe_of(tmp_path, {}))


def test_if_every_card_has_ended_nothing_is_left(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", until="2020-01-31")
    with pytest.raises(LichenError, match="every data card has ended"):
        gather_all(recipe_of(tmp_path, {"expired": "leave_out"}))


def test_a_clients_card_goes_before_that_of_the_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path / f"{name}.jsonl", licence="Zlib")
    (tmp_path / "a.card.yaml").unlink()
    (tmp_path / "c.card.yaml").unlink()
    place = write_card(tmp_path)
    assert place is not None
    place.write_text(place.read_text().replace("owner: null", "owner: F").replace("licence: null", "licence: MIT"))
    cards = gather_all(recipe_of(tmp_path, {})).cards
    assert cards.summary(["a", "b", "c"])["licences"] == {"MIT": 2, "Zlib": 1}
    assert cards.summary(["b"])["licences"] == {"Zlib": 1}
    with pytest.raises(LichenError, match="'b' comes under Zlib"):
        gather_all(recipe_of(tmp_path, {"licences": ["MIT"]}))
    (tmp_path / "b.jsonl").write_text((tmp_path / "b.jsonl").read_text() + "\n")
    (tmp_path / "b.card.yaml").unlink()
    with pytest.raises(LichenError, match="the rows of clients 'a', 'b', 'c' changed"):
        gather_all(recipe_of(tmp_path, {}))


def test_clients_of_a_column_count_by_the_files_in_which_they_have_rows(tmp_path: Path) -> None:
    for name, licence in (("x", "MIT"), ("y", "Zlib")):
        file = put(tmp_path / f"{name}.jsonl", licence=licence)
        who = "pq" if name == "x" else "qr"
        rows = [json.dumps({"said": f"{name} {n}", "mood": "ab"[n % 2], "who": who[n // 5]}) for n in range(10)]
        file.write_text("\n".join(rows) + "\n")
        place = tmp_path / f"{name}.card.yaml"
        place.write_text(card_text(DataCard(**{**GOOD, "licence": licence, "rows_sha256": rows_sha256(file)})))
    columns = {"client": "who", "text": "said", "label": "mood"}
    cards = gather_all(recipe_of(tmp_path, {}, columns=columns)).cards
    assert cards.summary(["p", "q", "r"])["licences"] == {"MIT": 2, "Zlib": 2}
    drawn = recipe_of(tmp_path, {}, partition={"by": "iid", "clients": 3})
    assert gather_all(drawn).cards.summary(["client-000", "client-001"])["licences"] == {"MIT": 2, "Zlib": 2}


def test_without_require_cards_are_read_and_faults_are_notes(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl")
    put(tmp_path / "b.jsonl", rows_sha256="0" * 64)
    put(tmp_path / "c.jsonl", until="2020-01-31")
    put(tmp_path / "d.jsonl")
    (tmp_path / "d.card.yaml").write_text("licence: Our terms")
    put(tmp_path / "e.jsonl")
    (tmp_path / "e.card.yaml").write_text(card_text(DataCard()))
    cards = gather_all(recipe_of(tmp_path, None)).cards
    assert cards.summary("abcde")["licences"] == {"MIT": 2}
    assert len(cards.notes) == 3
    assert [word in " ".join(cards.notes) for word in ("changed", "2020-01-31", "Our terms")] == [True] * 3
    assert cards.left == ()


@pytest.mark.parametrize("name", [entry.name for entry in CATALOG.values() if entry.kind == "data"])
def test_the_catalogue_makes_a_card_of_what_it_knows(name: str) -> None:
    card = catalogued_card(CATALOG[name])
    assert card.owner is not None
    assert CATALOG[name].package in card.owner
    assert card.licence is not None
    assert len(cards_of(DataConfig(name=name, require=RequireConfig())).checked) == 1
    with pytest.raises(LichenError, match=name):
        cards_of(DataConfig(name=name, require=RequireConfig(purposes=("surveillance",))))


def test_data_that_can_have_no_card_is_refused_where_one_is_required() -> None:
    with pytest.raises(LichenError, match="has no data card"):
        cards_of(DataConfig(name="someone/rows", require=RequireConfig()))
    assert cards_of(DataConfig(name="someone/rows")).checked == ()


@pytest.mark.parametrize(
    ("require", "where"),
    [
        ({"licences": ["Our terms"]}, "data.require.licences"),
        ({"licences": ["MIT OR Zlib"]}, "data.require.licences"),
        ({"purposes": ["Make money"]}, "data.require.purposes"),
        ({"expired": "ignore"}, "data.require.expired"),
        ({"consent": "yes"}, "data.require.consent"),
        ({"licenses": ["MIT"]}, "data.require.licenses"),
    ],
)
def test_what_is_required_is_read_strictly(require: dict[str, Any], where: str, tmp_path: Path) -> None:
    with pytest.raises(LichenError) as caught:
        recipe_of(tmp_path / "rows.jsonl", require)
    assert caught.value.where == where
