"""Owners claim a model by secret pairs among their rows: it holds for them alone, and not of the bare model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.audit.fingerprint import ANSWERS, PAIRS
from lichen.cli import main
from lichen.core.errors import LichenError
from lichen.recipes.artifacts.claim import claim
from lichen.recipes.artifacts.use.export import export
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.sides.fingerprints import read_fingerprint, registered
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe, save_model, save_rows

OWNERS = ("person-0", "person-2")


def key(file: Path, number: int) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(number.to_bytes(32, "big"))
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("claims")
    save_model(home / "model", more=ANSWERS)
    save_rows(home / "rows.jsonl", "pair", clients=3)
    for number, owner in enumerate(OWNERS):
        key(home / "secrets" / f"{owner}.key", number)
    key(home / "outsider.key", 99)
    lichen.run(whole(home), out=home / "run")
    return home


def whole(home: Path, **more: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "model": {"adapter": {"target_modules": "all-linear", "rank": 16, "alpha": 32}},
        "optimizer": {"name": "adamw", "lr": [0.02]},
        "federation": {"rounds": 6, "local_steps": 2, "batch_size": 16, "valid_every": 6},
        "fingerprint": {"secrets": str(home / "secrets"), "steps": 8},
        **more,
    }
    return recipe(home / "model", home / "rows.jsonl", "pair", **sections)


def test_an_owners_claim_holds_and_an_outsiders_does_not(home: Path) -> None:
    for owner in OWNERS:
        found = claim(home / "run", home / "secrets" / f"{owner}.key")
        assert found.holds, str(found)
        assert found.found >= 6
        assert found.registered == owner
        assert found.bare is not None
        assert found.bare_p is not None
        assert found.bare_p > 0.01
        assert "the claim holds" in str(found)
    other = claim(home / "run", home / "outsider.key")
    assert not other.holds
    assert other.p > 0.001
    assert other.registered == ""


def test_an_adapter_and_a_merged_model_can_be_claimed_too(home: Path) -> None:
    secret = home / "secrets" / f"{OWNERS[0]}.key"
    direct = claim(home / "run", secret)
    by_adapter = claim(home / "run" / "adapter", secret, run=home / "run", form="transcript")
    assert by_adapter == direct
    merged = claim(export(home / "run", merge=True), secret, form="transcript")
    assert merged.found == direct.found
    assert merged.bare is None
    assert merged.holds
    assert "name it by --base" in str(merged)
    named = claim(home / "run" / "merged", secret, form="transcript", base=str(home / "model"))
    assert named.bare == direct.bare


def test_the_digest_is_in_the_record_and_the_key_in_no_file(home: Path) -> None:
    named = json.loads((home / "run" / "fingerprints.json").read_text())
    assert named == {owner: read_fingerprint(home / "secrets" / f"{owner}.key").digest for owner in OWNERS}
    first = json.loads((home / "run" / "record.jsonl").read_text().splitlines()[0])
    assert "fingerprints.json" in first["files"]
    verify(home / "run")
    card = (home / "run" / "adapter" / "README.md").read_text()
    assert "2 owners can claim it by secret pairs" in card
    assert not [owner for owner in OWNERS if owner in card]
    pairs = read_fingerprint(home / "secrets" / f"{OWNERS[1]}.key").pairs()
    for file in (home / "run").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert (1).to_bytes(32, "big") not in content
            assert not [question for question, _ in pairs if question.encode() in content], file
    outsider, file = read_fingerprint(home / "outsider.key"), home / "run" / "fingerprints.json"
    content = file.read_bytes()
    file.write_text(json.dumps({"me": outsider.digest}))
    with pytest.raises(LichenError, match="not what the run's record began with"):
        registered(home / "run", outsider)
    file.write_bytes(content)


def test_an_owner_takes_its_steps_on_its_rows_and_then_those_on_its_pairs(home: Path) -> None:
    made = open_recipe(read_recipe(whole(home, engine={"packing": False}))).fingerprinted()
    source, plain = (client_tasks(made.experiment)[name].source for name in ("train lr=0.02", "alone lr=0.02"))
    for client, name in enumerate(one.name for one in made.clients_data):
        batches, own = list(source.batches((client,), 0)), list(plain.batches((client,), 0))
        assert len(own) == 2
        assert len(batches) == (2 + 8 if name in OWNERS else 2)
        questions = {row.tobytes() for batch in batches[2:] for row in batch["input_ids_CBT"][0].numpy()}
        assert len(questions) == (PAIRS if name in OWNERS else 0)  # a batch of 16 holds all
        rows = {row.tobytes() for batch in batches[:2] for row in batch["input_ids_CBT"][0].numpy()}
        assert not rows & questions


def test_other_processes_give_the_same_bytes(home: Path, tmp_path: Path) -> None:
    short = {"federation": {"rounds": 1, "local_steps": 2, "batch_size": 4}}
    finals = []
    for engine in ({"name": "local"}, {"name": "spawned", "nodes": 1}):
        run = lichen.run(
            whole(home, engine={"packing": False, **engine}, **short), out=tmp_path / engine["name"]
        ).folder
        finals.append((run / "state" / "final.safetensors").read_bytes())
    assert finals[0] == finals[1]
    plain = {
        name: section
        for name, section in whole(home, engine={"packing": False}, **short).items()
        if name != "fingerprint"
    }
    without = lichen.run(plain, out=tmp_path / "without").folder
    assert (without / "state" / "final.safetensors").read_bytes() != finals[0]
    assert not (without / "fingerprints.json").exists()


def test_what_does_not_fit_is_told_in_a_sentence(home: Path, tmp_path: Path) -> None:
    def refused(**more: Any) -> LichenError:
        with pytest.raises(LichenError) as told:
            lichen.run(whole(home, **more), out=tmp_path / "run")
        assert told.value.fix
        return told.value

    assert refused(fingerprint={"secrets": str(tmp_path / "none")}).where == "fingerprint.secrets"
    key(tmp_path / "wrong" / "nobody.key", 1)
    assert "nobody.key" in refused(fingerprint={"secrets": str(tmp_path / "wrong")}).what
    key(tmp_path / "open" / "person-1.key", 1).chmod(0o644)
    assert "others can read" in refused(fingerprint={"secrets": str(tmp_path / "open")}).what
    (key(tmp_path / "short" / "person-1.key", 1)).write_bytes(b"x")
    assert "no key" in refused(fingerprint={"secrets": str(tmp_path / "short")}).what
    private = {"rounds": 2, "weighting": "uniform", "valid_every": 1}
    with pytest.raises(LichenError, match="hides what one owner"):
        read_recipe(whole(home, privacy={"unit": "client", "epsilon": 8.0, "clip": 1.0}, federation=private))
    with pytest.raises(LichenError, match=r"data\.form"):
        read_recipe(whole(home, data={"form": "plain"}))
    with pytest.raises(LichenError, match="cannot be read"):
        claim(home / "run", tmp_path / "no.key")
    (home / "secrets" / "person-0.key").rename(tmp_path / "mine.key")
    with pytest.raises(LichenError, match="others than those"):
        lichen.run(whole(home), out=home / "run", resume=True)
    (tmp_path / "mine.key").rename(home / "secrets" / "person-0.key")


def test_the_commands(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "keys" / "ada.key"
    assert main(["fingerprint", str(made)]) == 0
    said = capsys.readouterr().out
    assert read_fingerprint(made).digest in said
    assert made.read_bytes().hex() not in said
    assert os.stat(made).st_mode & 0o777 == 0o600
    before = made.read_bytes()
    assert main(["fingerprint", str(made)]) == 0
    assert made.read_bytes() == before
    capsys.readouterr()
    assert main(["claim", str(home / "run"), "--secret", str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] == PAIRS
    assert found["holds"] is False
