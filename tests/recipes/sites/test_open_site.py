"""A site with its own rows alone announces what a simulation over everybody's files finds, and draws as that does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.roster import Member
from lichen.core.tree import digest
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.announced import Announcement, Assignment, enrolled
from lichen.recipes.sites.open_server import open_server
from lichen.recipes.sites.open_site import open_site
from lichen.recipes.sites.place import SitePlace
from support.sites import save_sites, sites_recipe

SHAPES: Mapping[str, tuple[Literal["pair", "label"], bool]] = {
    "chat": ("pair", False),
    "classify": ("label", False),
    "column": ("pair", True),
}
MORE: dict[str, Any] = {
    "engine": {"name": "spawned", "packing": False},
    "federation": {"rounds": 2, "local_steps": 2, "weighting": "rows"},
    "compare": {"baselines": []},
    "optimizer": {"lr": [0.02]},
}


def sent(plain: Any) -> Any:
    """What comes out at the other end."""
    return json.loads(json.dumps(plain))


@pytest.mark.parametrize("kind", SHAPES)
def test_sites_together_are_the_simulation(kind: str, tmp_path: Path) -> None:
    shape, named = SHAPES[kind]
    files = save_sites(tmp_path / "sites", shape, named=named)
    plain = sites_recipe(tmp_path, shape, named=named, **MORE)
    if kind == "chat":
        plain["federation"] |= {"ranks": [1, 2], "aggregate": "hetlora"}
    recipe = read_recipe(plain)
    whole = open_recipe(recipe)
    # A site has never heard of the folder.
    sites = {
        file.name: open_site(read_recipe({**plain, "data": {**plain["data"], "name": "elsewhere"}}), file)
        for file in files
    }

    announced = {name: Announcement.load(sent(site.announcement.dump())) for name, site in sites.items()}
    together = enrolled(recipe, announced)
    assert together.roster == whole.experiment.server.roster
    assert len(together.roster) == (9 if named else 3)

    server = open_server(recipe, together.roster, labels=together.labels).server
    ours = client_tasks(whole.experiment)
    seen = set[int]()
    for name, site in sites.items():
        loaded = site.join(Assignment.load(sent(together.assigned[name].dump())), tmp_path / "state")
        for side in (server, loaded.node.experiment.server):
            assert digest(side.start.flat()) == digest(whole.experiment.start.flat())
            assert (side.classes, side.pad) == (whole.experiment.server.classes, whole.experiment.server.pad)
            assert side.model.base == whole.experiment.model.base
        tasks = loaded.client_tasks()
        assert tasks.keys() == ours.keys()
        for client in loaded.numbers:
            assert together.homes[client] == name
            for task in ours:
                batches = [list(some[task].source.batches((client,), 5)) for some in (tasks, ours)]
                assert len(batches[0]) == len(batches[1])
                for mine, other in zip(*batches, strict=True):
                    assert mine.keys() == other.keys()
                    assert all(torch.equal(mine[key], other[key]) for key in mine)
            with pytest.raises(LichenError, match="ask its own site"):
                tasks["valid"].source.batches((client, (client + 1) % len(together.roster) + len(together.roster)), 0)
        others = set(range(len(together.roster))) - set(loaded.numbers)
        for client in others:
            with pytest.raises(LichenError, match="is not of this site"):
                tasks["test"].source.shape(client)
            assert not any(loaded.node.experiment.server.roster[client].rows.values())
        seen |= set(loaded.numbers)
    assert seen == set(range(len(together.roster)))


@pytest.mark.parametrize("kind", SHAPES)
def test_what_a_site_announces_is_counts_names_and_labels(kind: str, tmp_path: Path) -> None:
    shape, named = SHAPES[kind]
    file = save_sites(tmp_path / "sites", shape, named=named)[0]
    site = open_site(read_recipe(sites_recipe(tmp_path, shape, named=named, **MORE)), file)
    dumped = json.dumps(site.announcement.dump())
    for row in map(json.loads, file.read_text().splitlines()):
        for column in ("ask", "reply", "said"):
            assert column not in row or row[column] not in dumped
    assert [set(member) for member in site.announcement.dump()["members"]] == [{"name", "rows", "group"}] * (
        3 if named else 1
    )
    assert site.announcement.labels == (("calm", "glad") if shape == "label" else ())


def test_a_recipe_that_needs_everybodys_rows_is_refused_by_its_key(tmp_path: Path) -> None:
    file = save_sites(tmp_path / "sites", "pair")[0]
    plain = sites_recipe(tmp_path, "pair", **MORE)
    cases = {
        "data.max_clients": ["data.max_clients=2"],
        "data.copies": ["data.copies=drop"],
        "data.partition.by": ["data.partition.by=iid", "data.partition.clients=3"],
        "federation.memory": ["federation.memory=[1]"],
        "compare.baselines": ['compare.baselines=["pooled"]'],
    }
    for key, changes in cases.items():
        with pytest.raises(LichenError) as wrong:
            open_site(read_recipe(plain, changes), file)
        assert wrong.value.where == key
        assert wrong.value.fix


def test_files_that_name_no_client_or_labels_that_are_texts_are_refused(tmp_path: Path) -> None:
    rows = save_sites(tmp_path / "sites", "label")[0].read_text()
    recipe = read_recipe(sites_recipe(tmp_path, "label", **MORE))
    for name in ("train.jsonl", "data/test.jsonl"):
        file = tmp_path / "other" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rows)
    with pytest.raises(LichenError, match="says whose rows these are"):
        open_site(recipe, tmp_path / "other" / "train.jsonl")
    with pytest.raises(LichenError, match="holds folders"):
        open_site(recipe, tmp_path / "other")
    texts = read_recipe(sites_recipe(tmp_path, "label", **MORE), ["data.columns.label=said", "data.columns.text=mood"])
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"said": "w1 " * 90 + str(n % 2), "mood": "calm"}) + "\n" for n in range(20)))
    with pytest.raises(LichenError, match="no line of at most 200 letters") as wrong:
        open_site(texts, long)
    assert wrong.value.where == "data.columns.label"
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"said": f"w{n}", "mood": "calm"}) + "\n" for n in range(30)))
    with pytest.raises(LichenError, match="30 classes in 30 rows"):
        open_site(texts, many)


def test_a_roster_of_sites_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    recipe = read_recipe(sites_recipe(tmp_path, "label", **MORE))
    one = Announcement(members=(Member(name="a", rows={"train": 3}, group="tokens"),), labels=("calm", 2))
    with pytest.raises(LichenError, match="sites 'x' and 'y' announce the client 'a'"):
        enrolled(recipe, {"x": one, "y": one})
    other = Announcement(members=(Member(name="B", rows={"train": 30}, group="tokens"),), labels=("glad", 10))
    both = enrolled(recipe, {"x": one, "y": other})
    assert (both.roster.names, both.homes, both.labels) == (("B", "a"), ("y", "x"), ("10", "2", "calm", "glad"))
    numbers = [Announcement(members=some.members, labels=(n,)) for some, n in ((one, 10), (other, 9))]
    assert enrolled(recipe, dict(zip("xy", numbers, strict=True))).labels == ("9", "10")
    with pytest.raises(LichenError, match="no site has a row with the label 'sad'"):
        enrolled(read_recipe(sites_recipe(tmp_path, "label", **MORE), ["data.classes=[sad,glad]"]), {"y": other})
    for damaged in ({}, {"members": [], "labels": []}, {**one.dump(), "labels": [1.5]}, {**one.dump(), "labels": "ab"}):
        with pytest.raises(LichenError):
            Announcement.load(damaged)
    good = both.assigned["x"].dump()
    wrong = [{"bounds": bounds} for bounds in ([1], [3, 2], [-1, 2], [1.0, 2], "12")]
    for change in (
        *({"numbers": [2]}, {"numbers": [1, 0]}, {"clients": 0}, {"labels": [2]}, {"numbers": [True]}),
        *wrong,
    ):
        with pytest.raises(LichenError):
            Assignment.load({**good, **change})
    assert np.array_equal(Assignment.load(good).numbers, [1])


def test_a_site_keeps_its_place_and_no_client_gets_anothers_state(tmp_path: Path) -> None:
    file, *_ = save_sites(tmp_path / "sites", "pair")
    recipe, state = read_recipe(sites_recipe(tmp_path, "pair", **MORE)), tmp_path / "state"
    site = open_site(recipe, file)
    place = SitePlace(site, state)
    assert json.loads((state / "announced.json").read_text()) == site.announcement.dump()
    with pytest.raises(LichenError, match="no place in the roster yet"):
        place.loaded()
    with pytest.raises(LichenError, match="is assigned 2 clients, and has announced 1"):
        place.take(Assignment(numbers=(0, 1), clients=3))
    place.take(Assignment(numbers=(2,), clients=3))
    place.take(Assignment(numbers=(2,), clients=3))
    again = SitePlace(site, state)
    assert again.loaded().numbers == (2,)
    with pytest.raises(LichenError, match="has another place"):
        again.take(Assignment(numbers=(1,), clients=3))
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[:-4]))
    with pytest.raises(LichenError, match="rows have changed"):
        SitePlace(open_site(recipe, file), state)
    (state / "place.json").write_text("{")
    with pytest.raises(LichenError, match="is damaged"):
        SitePlace(site, state)
