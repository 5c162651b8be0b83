"""The list of methods: complete, with the papers of the documents, and true of what recipes refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lichen import cli
from lichen.core.errors import LichenError
from lichen.recipes.schema.fits import FEATURES
from lichen.recipes.schema.methods import Entry, every_method
from lichen.recipes.schema.read import read_recipe
from recipes.schema.test_named_keys import is_key

DOCS = Path(__file__).parents[3] / "docs"
ENTRIES = every_method()
CHAT = {"task": "chat", "model": {"name": "m"}, "data": {"name": "d"}, "compare": {"baselines": []}}


def test_every_key_that_is_named_is_one() -> None:
    keys = {feature.key for feature in FEATURES}
    keys |= {clash.other for feature in FEATURES for clash in feature.clashes}
    keys |= {name.partition(":")[0] for entry in ENTRIES for name in (entry.name, *entry.refuses)}
    assert {key for key in keys if not is_key(key)} == set()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_papers_are_those_of_the_documents(entry: Entry) -> None:
    known = "".join((DOCS / name).read_text("utf-8") for name in ("methods.md", "adapting.md", "helping.md"))
    for paper in entry.papers:
        for number in re.findall(r"\d{4}\.\d{5}", paper):
            assert f"<https://arxiv.org/abs/{number}>" in known
    assert entry.papers or entry.kind == "engine"
    assert entry.summary


def test_short_citations_name_the_first_author_and_the_year_of_the_documents() -> None:
    text = " ".join((DOCS / "methods.md").read_text("utf-8").split())
    seen = 0
    for paper in {paper for entry in ENTRIES for paper in entry.papers if ", https://" in paper}:
        short, _, url = paper.partition(", https://")
        before, found, _ = text.partition(f"<https://{url}>")
        if found:
            seen += 1
            # The last citation before the address: authors, title, venue and year.
            cited = re.split(r"Papers?: |abs/[\d.]+>\. ", before)[-1]
            if "above" not in cited:
                assert short.split()[0] in cited, (paper, cited)
                assert re.findall(r"\d{4}", short)[-1] in cited, (paper, cited)
    assert seen > 15


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.kind == "rule"], ids=lambda entry: entry.name)
def test_a_rule_refuses_what_the_list_says(entry: Entry) -> None:
    uses = {
        "federation.server": "federation.server.lr=0.5",
        "federation.fair": "federation.fair=qffl",
        "federation.ranks": "federation.ranks=[2]",
        "federation.memory": "federation.memory=[1]",
        "federation.keep_optimizer": "federation.keep_optimizer=true",
    }
    for key, word in uses.items():
        told = ""
        try:
            read_recipe(CHAT, [entry.name.replace(": ", "="), word])
        except LichenError as error:
            told = error.where
        assert (told == key) == (key in entry.refuses)


def test_the_list_on_screen_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "methods"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["list", "methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == [entry.name for entry in ENTRIES]
    assert all(one["name"] in shown for one in found)
    assert cli.main(["list", "--json"]) == 2
