"""People with a data card each: a card that has ended stops the run, or leaves its owner out, and that is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import lichen
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.cards.card_files import rows_sha256
from lichen.present.charts.card_terms import owners_text, terms_matter, terms_text
from lichen.recipes.rows.data_card import DataCard, card_text
from support.tiny_llama import recipe, save_model, say

PEOPLE = ("abelard", "bertil", "quentin")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model, and a folder with a file and a card a person; Bertil's has ended."""
    folder = tmp_path_factory.mktemp("cards")
    save_model(folder / "model")
    (folder / "people").mkdir()
    for n, name in enumerate(PEOPLE):
        rng, file = numpy_generator(n, "people"), folder / "people" / f"{name}.jsonl"
        rows = [{"prompt": say(rng, 3), "completion": say(rng, 5)} for _ in range(10)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        card = DataCard(
            owner=f"Owner {n}",
            source="https://huggingface.co/datasets/people/talk" if n == 0 else "said by themselves",
            rows_sha256=rows_sha256(file),
            licence="MIT" if n < 2 else "CC-BY-4.0",
            consent="consent",
            purposes=("training",),
            until="2020-01-31" if name == "bertil" else None,
        )
        (folder / "people" / f"{name}.card.yaml").write_text(card_text(card))
    return folder


def chat(home: Path, require: dict[str, Any]) -> dict[str, Any]:
    made = recipe(home / "model", home / "people", "pair", federation={"rounds": 1, "local_steps": 1})
    made["data"] |= {"columns": {}, "form": "chat", "require": {"purposes": ["training"], "consent": True, **require}}
    return made


def test_a_card_that_has_ended_stops_the_run_by_the_persons_name(home: Path, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="client 'bertil' ended on 2020-01-31"):
        lichen.run(chat(home, {}), out=tmp_path / "run")


def test_or_the_run_goes_on_without_and_screen_summary_and_model_card_say_so(home: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    result = lichen.run(chat(home, {"expired": "leave_out"}), out=tmp_path / "run", say=lines.append)
    (line,) = [line for line in lines if "left out" in line and "data card" in line]
    assert "1 client, whose rows were not read" in line
    assert "2020-01-31" in line
    assert "bertil" in line
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["clients"] == 2
    assert summary["licences"] == {"CC-BY-4.0": 1, "MIT": 1}
    assert [(one["owner"], one["clients"], len(one["sha256"])) for one in summary["cards"]] == [
        ("Owner 0", 1, 64),
        ("Owner 2", 1, 64),
    ]
    assert [(one["owner"], one["clients"]) for one in summary["cards_left"]] == [("Owner 1", ["bertil"])]
    exported = lichen.export(tmp_path / "run", merge=True, out=tmp_path / "merged")
    assert result.adapter is not None
    for folder in (result.adapter, exported):
        text = (folder / "README.md").read_text()
        matter = yaml.safe_load(text.split("---\n")[1])
        assert matter["license"] == "other"
        assert matter["license_details"] == ["CC-BY-4.0", "MIT"]
        assert matter["datasets"] == ["people/talk"]
        assert "Left out: 1 client of Owner 1: the data card ended on 2020-01-31" in text
        assert "| Owner 2 | 1 | said by themselves | CC-BY-4.0 | training | no end |" in text
        assert not any(name in text for name in PEOPLE), "a card names owners as they name themselves, and no client"


def test_one_licence_is_named_as_the_hub_calls_it_and_several_are_listed() -> None:
    assert terms_matter("", {"licences": {"MIT": 3}}) == {"license": "mit"}
    assert terms_matter("MIT", {"licences": {"MIT": 3}}) == {"license": "mit"}
    assert terms_matter("MIT", {}) == {"license": "mit"}
    assert terms_matter("", {}) == {}
    for base, names in (("MIT", ["Zlib"]), ("", ["LicenseRef-own"]), ("", ["MIT OR Zlib"]), ("MIT", ["not stated"])):
        found = terms_matter(base, {"licences": dict.fromkeys(names, 1)})
        assert found["license"] == "other"
        assert found["license_details"] == sorted({*names, *([base] if base else [])})


def test_what_an_owner_says_breaks_no_table_and_many_owners_are_a_number() -> None:
    card = {"owner": "a|b <script>", "clients": 1, "source": None, "licence": None, "purposes": [], "until": None}
    text = owners_text({"cards": [card] * 60})
    assert "| a\\|b &lt;script> | 1 | not stated | not stated | not stated | no end |" in text
    assert "and 10 more owners" in text
    assert owners_text({}) == terms_text("", {}) == ""
