"""A site holds its own data cards against the recipe, and tells the server under which terms its rows come, no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.roster import Member
from lichen.data.cards.card_files import card_place, rows_sha256
from lichen.recipes.rows.data_card import DataCard, card_text
from lichen.recipes.schema.data import RequireConfig
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.announced import Announcement
from lichen.recipes.sites.announced_cards import AnnouncedCard, enrolled_cards
from lichen.recipes.sites.open_site import open_site
from lichen.recipes.sites.place import SitePlace
from support.site_threads import sites_in_threads
from support.sites import save_sites, sites_recipe

MORE: dict[str, Any] = {"federation": {"rounds": 1, "local_steps": 1}}
REQUIRE = {"licences": ["MIT", "CC-BY-4.0"], "purposes": ["training"], "consent": True}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with sites_in_threads():
        yield


def give_cards(files: tuple[Path, ...], *, licences: tuple[str, ...] = ("MIT", "MIT", "CC-BY-4.0")) -> None:
    for n, (file, licence) in enumerate(zip(files, licences, strict=True)):
        card = DataCard(
            owner=f"Secret owner {n}",
            source="a secret source",
            contact="secret@example.org",
            rows_sha256=rows_sha256(file),
            licence=licence,
            consent="contract",
            purposes=("training",),
        )
        card_place(file).write_text(card_text(card), encoding="utf-8")


def recipe_of(home: Path, **require: Any) -> dict[str, Any]:
    made = sites_recipe(home, "pair", **MORE)
    made["data"]["require"] = {**REQUIRE, **require}
    return made


def test_a_run_over_sites_has_their_licences_and_not_their_owners(tmp_path: Path) -> None:
    files = save_sites(tmp_path / "sites", "pair")
    give_cards(files)
    sites = dict(zip("abc", files, strict=True))
    result = lichen.run(recipe_of(tmp_path), out=tmp_path / "run", sites=sites)
    assert result.summary["licences"] == {"MIT": 2, "CC-BY-4.0": 1}
    assert {one["licence"] for one in result.summary["cards"]} == {"MIT", "CC-BY-4.0"}
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert b"ecret" not in file.read_bytes(), file
    assert result.adapter is not None
    assert "CC-BY-4.0 (1 client)" in (result.adapter / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("at", "licence"), [(0, "GPL-3.0-only"), (1, None)])
def test_a_site_whose_card_does_not_fit_ends_the_run_by_name(at: int, licence: str | None, tmp_path: Path) -> None:
    files = save_sites(tmp_path / "sites", "pair")
    give_cards(files)
    if licence is None:
        card_place(files[at]).unlink()
    else:
        give_cards((files[at],), licences=(licence,))
    said = "has no data card" if licence is None else "comes under GPL-3.0-only"
    with pytest.raises(LichenError, match=said):
        open_site(read_recipe(recipe_of(tmp_path)), files[at])
    with pytest.raises(LichenError, match="site"):
        lichen.run(recipe_of(tmp_path), out=tmp_path / "run", sites=dict(zip("abc", files, strict=True)))


def test_a_site_tells_of_its_cards_where_the_recipe_asks_and_what_it_can_ask(tmp_path: Path) -> None:
    file, *_ = files = save_sites(tmp_path / "sites", "pair")
    give_cards(files)
    plain = read_recipe(sites_recipe(tmp_path, "pair", **MORE))
    assert open_site(plain, file).announcement.dump().keys() == {"members", "labels"}
    asked = open_site(read_recipe(recipe_of(tmp_path)), file)
    (card,) = asked.announcement.dump()["cards"]
    assert card.keys() == {"licence", "purposes", "until", "sha256", "clients"}
    assert Announcement.load(json.loads(json.dumps(asked.announcement.dump()))) == asked.announcement


def test_a_card_may_be_renewed_while_a_site_has_its_place(tmp_path: Path) -> None:
    from lichen.recipes.sites.announced import Assignment

    file, *_ = files = save_sites(tmp_path / "sites", "pair")
    give_cards(files)
    recipe = read_recipe(recipe_of(tmp_path))
    SitePlace(open_site(recipe, file), tmp_path / "state").take(Assignment(numbers=(2,), clients=3))
    place = card_place(file)
    place.write_text(place.read_text(encoding="utf-8").replace("until: null", "until: 2999-01-01"), encoding="utf-8")
    again = SitePlace(open_site(recipe, file), tmp_path / "state")
    assert again.assigned == Assignment(numbers=(2,), clients=3)
    assert "2999-01-01" in (tmp_path / "state" / "announced.json").read_text(encoding="utf-8")


GOOD: dict[str, Any] = {
    "licence": "MIT",
    "purposes": ["training"],
    "until": None,
    "sha256": "0" * 64,
    "clients": [0],
}


@pytest.mark.parametrize(
    "change",
    [
        {"owner": "x"},
        {"licence": "Our terms"},
        {"licence": 3},
        {"licence": "(" * 10_000},
        {"purposes": ["A B"]},
        {"purposes": [["training"]]},
        {"until": "soon"},
        {"sha256": "0"},
        {"sha256": 0},
        {"clients": []},
        {"clients": [2]},
        {"clients": [0, 0]},
        {"clients": [True]},
        {"clients": 0},
    ],
)
def test_what_is_announced_of_a_card_is_checked(change: dict[str, Any]) -> None:
    assert AnnouncedCard.load(GOOD, 2).dump() == GOOD
    with pytest.raises(LichenError) as caught:
        AnnouncedCard.load({**GOOD, **change}, 2)
    assert caught.value.where == "roster"
    members = [Member(name=name, rows={"train": 3}).dump() for name in "ab"]
    with pytest.raises(LichenError):
        Announcement.load({"members": members, "labels": [], "cards": [{**GOOD, **change}]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"licence": "Zlib"}, "client 'a' of site 's' comes under Zlib"),
        ({"licence": None}, "comes under no licence"),
        ({"purposes": []}, "does not grant training"),
        ({"until": "2020-01-01"}, "ended on 2020-01-01"),
        ({"clients": [1]}, "client 'a' of site 's' is announced without a data card"),
    ],
)
def test_the_server_holds_what_it_is_told_against_the_recipe(change: dict[str, Any], said: str | None) -> None:
    members = [Member(name=name, rows={"train": 3}) for name in "ab"]
    cards = [AnnouncedCard.load({**GOOD, "clients": [0, 1], **change}, 2)]
    require = RequireConfig(licences=("MIT",), purposes=("training",))

    def enrol(require: RequireConfig | None) -> dict[str, int]:
        found = enrolled_cards(require, {"s": (members, cards)}, today=lambda: date(2026, 1, 1))
        licences: dict[str, int] = found.summary(["a", "b"])["licences"]
        return licences

    if said is None:
        assert enrol(require) == {"MIT": 2}
        return
    with pytest.raises(LichenError, match=said):
        enrol(require)
