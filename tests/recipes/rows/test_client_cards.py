"""A card for each client of rows that lie in one file: who has none takes no part, and who does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.data.cards.card_files import rows_sha256
from lichen.recipes.rows.client_cards import client_cards
from lichen.recipes.rows.data_card import DataCard, card_text
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.open_server import refuse_rows
from support.tiny_llama import recipe, save_model, save_rows

PEOPLE = tuple(f"person-{number}" for number in range(4))
EVERYBODY = {**dict.fromkeys(PEOPLE, 10), "person-4": 10}


def put(folder: Path, name: str, **more: Any) -> Path:
    """A card that grants training."""
    about = {"owner": f"Owner of {name}", "licence": "MIT", "consent": "consent", "purposes": ("training",), **more}
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.card.yaml"
    file.write_text(card_text(DataCard(**about)))
    return file


def data(home: Path, require: Mapping[str, Any] | None = None, **more: Any) -> Any:
    values = {"name": str(home / "rows.jsonl"), "cards": str(home / "cards"), "require": require, **more}
    made = {"task": "chat", "model": {"name": "m"}, "data": values, "compare": {"baselines": []}}
    return read_recipe(made).data


def test_one_card_has_ended_and_the_run_stops_or_goes_on_without(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    rows = save_rows(tmp_path / "rows.jsonl", "pair", clients=5)
    for name in PEOPLE:
        put(tmp_path / "cards", name, rows_sha256=rows_sha256(rows))
    put(tmp_path / "cards", "person-2", until="2020-01-31")
    made = recipe(tmp_path / "model", rows, "pair", federation={"rounds": 1, "local_steps": 1})
    made["data"] |= {"cards": str(tmp_path / "cards"), "require": {"purposes": ["training"], "consent": True}}
    with pytest.raises(LichenError, match="client 'person-2' ended on 2020-01-31"):
        lichen.run(made, out=tmp_path / "run")
    made["data"]["require"]["expired"] = "leave_out"
    lines: list[str] = []
    run = lichen.run(made, out=tmp_path / "run", say=lines.append).folder
    summary = json.loads((run / "summary.json").read_text())
    assert [member["name"] for member in json.loads((run / "roster.json").read_text())["members"]] == [
        "person-0",
        "person-1",
        "person-3",
    ]
    assert summary["licences"] == {"MIT": 3}
    assert [(one["owner"], one["clients"]) for one in summary["cards"]] == [
        (f"Owner of person-{n}", 1) for n in (0, 1, 3)
    ]
    assert [one["clients"] for one in summary["cards_left"]] == [["person-2"]]
    card = (run / "adapter" / "README.md").read_text()
    assert "Left out: 1 client of Owner of person-2: the data card ended on 2020-01-31" in card
    assert any("10 rows of 1 client: clients without a card in data.cards" in line for line in lines)
    assert any("10 rows of 1 client: the data card ended on 2020-01-31" in line for line in lines)


def test_who_has_no_card_takes_no_part(tmp_path: Path) -> None:
    save_rows(tmp_path / "rows.jsonl", "pair", clients=5)
    put(tmp_path / "cards", "person-1")
    found = client_cards(data(tmp_path), EVERYBODY)
    assert [one.clients for one in found.checked] == [frozenset({"person-1"})]
    assert found.notes == ()
    put(tmp_path / "cards", "person-1", until="2020-01-31")
    (note,) = client_cards(data(tmp_path), EVERYBODY).notes
    assert "client 'person-1' ended on 2020-01-31" in note


@pytest.mark.parametrize(
    ("card", "require", "where", "why"),
    [
        ({}, {"licences": ["Zlib"]}, "person-1.card.yaml", "client 'person-1' comes under MIT"),
        ({"purposes": ()}, {"purposes": ["training"]}, "person-1.card.yaml", "purposes of client 'person-1'"),
        ({"owner": None}, {}, "person-1.card.yaml", "owner of client 'person-1' is not filled in"),
        ({"rows_sha256": "0" * 64}, None, "person-1.card.yaml", "changed after the card was written"),
        ({"until": "2020-01-31"}, {"expired": "leave_out"}, "data.require.expired", "every data card has ended"),
    ],
)
def test_a_card_that_does_not_fit_is_named(
    tmp_path: Path, card: dict[str, Any], require: dict[str, Any] | None, where: str, why: str
) -> None:
    save_rows(tmp_path / "rows.jsonl", "pair", clients=5)
    put(tmp_path / "cards", "person-1", **card)
    with pytest.raises(LichenError) as caught:
        client_cards(data(tmp_path, require), EVERYBODY)
    assert caught.value.where.endswith(where)
    assert why in caught.value.what
    assert caught.value.fix


def test_a_folder_without_cards_and_cards_of_nobody_are_refused(tmp_path: Path) -> None:
    save_rows(tmp_path / "rows.jsonl", "pair", clients=5)
    with pytest.raises(LichenError, match="holds no data card"):
        client_cards(data(tmp_path), EVERYBODY)
    put(tmp_path / "cards", "person-9")
    with pytest.raises(LichenError, match="'person-9' is no client of"):
        client_cards(data(tmp_path), EVERYBODY)
    with pytest.raises(LichenError, match="deals rows out"):
        data(tmp_path, partition={"by": "iid"})
    whole = read_recipe({"task": "chat", "model": {"name": "m"}, "data": {"name": "d", "cards": "c"}})
    with pytest.raises(LichenError, match="each site holds its own cards"):
        refuse_rows(whole.model_copy(update={"compare": whole.compare.model_copy(update={"baselines": ()})}))


def test_a_packages_digest_is_the_catalogues(tmp_path: Path) -> None:
    put(tmp_path / "cards", "person-1", rows_sha256="0" * 64)
    with pytest.raises(LichenError, match="chitchat, in which the rows of client 'person-1' lie, changed"):
        client_cards(data(tmp_path, name="chitchat"), EVERYBODY)
    put(tmp_path / "cards", "person-1")
    assert len(client_cards(data(tmp_path, name="chitchat"), EVERYBODY).checked) == 1
    put(tmp_path / "cards", "person-1", rows_sha256="0" * 64)
    with pytest.raises(LichenError, match="can be held against no file"):
        client_cards(data(tmp_path, name="some/hub-data"), EVERYBODY)
