"""Owners' secret keys stay at their sites: their digests are registered before training, and their claims hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.federation.test_host import Hosts, learned, submit, submitted

import lichen
from lichen.audit.fingerprint import ANSWERS
from lichen.core.errors import LichenError
from lichen.recipes.artifacts.claim import claim
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.assemble.sides.fingerprints import own_fingerprints, read_fingerprint
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.sites.announced import Announcement
from lichen.recipes.sites.announced_fingerprints import enrolled_fingerprints
from support.sites import SITES, save_sites
from support.tiny_llama import save_model

NORTH, WITHOUT, SOUTH = SITES
CLIENTS = {NORTH: "ward.b", WITHOUT: "clinic", SOUTH: "Ward-a"}
NUMBERS = {NORTH: 1, SOUTH: 2}
LONG: dict[str, Any] = {
    "model": {"adapter": {"target_modules": "all-linear", "rank": 16, "alpha": 32}},
    "optimizer": {"name": "adamw", "lr": [0.02]},
    "federation": {"rounds": 6, "local_steps": 2, "batch_size": 16, "valid_every": 6},
    "engine": {"packing": False, "clients_per_block": 1},
}


def bytes_of(number: int) -> bytes:
    return hashlib.sha256(f"key {number}".encode()).digest()


def key(file: Path, number: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes_of(number))
    file.chmod(0o600)
    return file


def recipe(home: Path, **fingerprint: Any) -> dict[str, Any]:
    return submitted(home, fingerprint={"steps": 8, **fingerprint}, **LONG)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three sites, of which the first has its owner's key, and the last a folder of keys."""
    home = tmp_path_factory.mktemp("secrets")
    files = save_sites(home / "sites", "pair")
    model = save_model(home / "model", more=ANSWERS)
    hosts = Hosts(home, files, models=str(model))
    hosts.secrets = {NORTH: key(home / "north" / "mine.key", 1), SOUTH: key(home / "south" / "Ward-a.key", 2).parent}
    for name in SITES:
        hosts.restart(name)
    submit(hosts, recipe(home))
    yield hosts
    hosts.close()


def test_owners_at_sites_claim_what_was_trained_there(made: Hosts) -> None:
    run, files = made.home / "run", {NORTH: "north/mine.key", SOUTH: "south/Ward-a.key"}
    for site, file in files.items():
        found = claim(run, made.home / file)
        assert found.holds, str(found)
        assert found.registered == CLIENTS[site]
        assert claim(run / "adapter", made.home / file, run=run, form="transcript") == found
    other = claim(run, key(made.home / "other.key", 99))
    assert not other.holds
    assert not other.registered
    verify(run)
    assert "2 owners can claim it by secret pairs" in (run / "adapter" / "README.md").read_text()


def test_no_more_than_the_digest_of_a_key_is_anywhere(made: Hosts) -> None:
    run, keys = made.home / "run", {"north/mine.key", "south/Ward-a.key", "other.key"}
    digests = {CLIENTS[site]: own_fingerprints(made.secrets[site], [CLIENTS[site]]) for site in NUMBERS}
    registered = {name: found[name].digest for name, found in digests.items()}
    assert json.loads((run / "fingerprints.json").read_text()) == registered
    begun = json.loads((run / "record.jsonl").read_text().splitlines()[0])
    assert "fingerprints.json" in begun["files"]
    questions = [question for found in digests.values() for one in found.values() for question, _ in one.pairs()]
    for file in made.home.rglob("*"):  # the coordinator's and the sites'
        if file.is_file() and str(file.relative_to(made.home)) not in keys:
            content = file.read_bytes()
            assert not [number for number in NUMBERS.values() if bytes_of(number) in content], file
            assert not [question for question in questions if question.encode() in content], file
    for site in NUMBERS:
        assert any(registered[CLIENTS[site]] in line for line in made.lines[site])
    assert any("this site no key" in line for line in made.lines[WITHOUT])


def test_secret_pairs_at_sites_are_those_of_a_simulation(made: Hosts) -> None:
    key(made.home / "secrets" / "ward.b.key", 1)
    key(made.home / "secrets" / "Ward-a.key", 2)
    whole = recipe(made.home, secrets=str(made.home / "secrets"))
    whole["data"]["name"] = str(made.home / "sites")
    lichen.run(whole, out=made.home / "local")
    apart, local = learned(made.home / "run"), learned(made.home / "local")
    assert len(apart) >= 4
    assert apart == local


def test_a_recipe_without_fingerprints_does_not_use_a_key(made: Hosts) -> None:
    plain = {name: one for name, one in recipe(made.home).items() if name != "fingerprint"}
    plain["federation"] |= {"rounds": 1, "local_steps": 1, "valid_every": 1}
    submit(made, plain, "plain")
    assert any("the secret key is not used" in line for line in made.lines[NORTH])
    assert not (made.home / "plain" / "fingerprints.json").exists()


def test_what_does_not_fit_is_told_in_a_sentence(tmp_path: Path) -> None:
    asked, without = read_recipe(submitted(tmp_path, fingerprint={"steps": 4})), read_recipe(submitted(tmp_path))
    one, two = key(tmp_path / "one.key", 1), key(tmp_path / "all" / "b.key", 2)
    digest = read_fingerprint(one).digest
    assert own_fingerprints(None, ["a"]) == {}
    assert own_fingerprints(one, ["a"]).keys() == {"a"}
    assert own_fingerprints(two, ["a", "b"]).keys() == own_fingerprints(two.parent, ["a", "b"]).keys() == {"b"}
    for secret, clients, says in (
        (one, ["a", "b"], "named as none of them"),
        (two.parent, ["a"], "named as no client"),
        (tmp_path / "model", ["a"], "holds no file"),
        (tmp_path / "none.key", ["a"], "cannot be read"),
    ):
        with pytest.raises(LichenError, match=says):
            own_fingerprints(secret, clients)
    for recipe_, announced, says in (
        (asked, [{}, {}], "no site has a secret key"),
        (without, [{"a": digest}], "and the recipe has none"),
        (asked, [{"a": digest}, {"b": digest}], "announce one key"),
    ):
        with pytest.raises(LichenError, match=says):
            enrolled_fingerprints(recipe_, announced)
    assert enrolled_fingerprints(asked, [{"a": digest}, {}]) == {"a": digest}
    with pytest.raises(LichenError, match="at their sites") as wrong:
        lichen.run(recipe(tmp_path, secrets="secrets"), out=tmp_path / "run", sites={"a": one})
    assert wrong.value.where == "fingerprint.secrets"
    whole = recipe(tmp_path)
    whole["data"]["name"] = str(save_sites(tmp_path / "sites", "pair")[0].parent)
    with pytest.raises(LichenError, match="no folder has") as wrong:
        lichen.run(whole, out=tmp_path / "run")
    assert wrong.value.where == "fingerprint.secrets"


@pytest.mark.parametrize(
    "fingerprints", [[], "x", {"b": "0" * 64}, {"a": "0" * 63}, {"a": "G" * 64}, {"a": 1}, {1: "0" * 64}, {"a": None}]
)
def test_what_is_no_announcement_of_digests_is_refused(fingerprints: object) -> None:
    member = {"name": "a", "rows": {"train": 1}, "group": "tokens"}
    plain = {"members": [member], "labels": [], "fingerprints": fingerprints}
    with pytest.raises(LichenError, match="digests of 64 hex digits"):
        Announcement.load(plain)
    good = Announcement.load({**plain, "fingerprints": {"a": "0" * 64}})
    assert Announcement.load(good.dump()) == good
