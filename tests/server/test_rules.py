"""What rules declare is what their aggregators do, and their papers are those of the documents."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from lichen.declared import Property
from lichen.server.rules import DECIDES, RULES, RuleSettings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_declares_what_its_aggregator_does(name: str) -> None:
    rule = RULES[name]
    made = rule.make(RuleSettings(scaling=2.0, energy=0.9))
    summed = made if rule.make_summed is None else rule.make_summed(RuleSettings(scaling=2.0, energy=0.9))
    assert summed.needs == ("sum" if Property.SUMS in rule.allows else "single")
    assert rule.make_summed is None or made.needs == "single"
    assert rule.allows <= DECIDES
    moves = bool(rule.freezes or rule.local_params)
    assert (Property.ONE_LAYOUT in rule.allows) != moves


@pytest.mark.parametrize("name", RULES)
def test_what_a_recipe_says_reaches_every_part_that_has_a_field_for_it(name: str) -> None:
    settings = RuleSettings(weighting="uniform", scaling=2.5, energy=0.7, seed=11)
    said = {"weighting": "uniform", "scaling": 2.5, "mend": 2.5, "energy": 0.7, "seed": 11}

    def check(part: Any) -> None:
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name in said and value is not None:
                assert value == said[field.name], (type(part), field.name)
            if is_dataclass(value):
                check(value)

    check(RULES[name].make(settings))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_carries_the_paper_of_the_documents(name: str) -> None:
    known = (DOCS / "methods.md").read_text("utf-8") + (DOCS / "adapting.md").read_text("utf-8")
    assert RULES[name].papers
    for paper in RULES[name].papers:
        assert f"<{paper.url}>" in known


def test_reading_the_table_imports_no_torch() -> None:
    code = "import sys, lichen.server.rules; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
