"""What rules declare is what their aggregators do, and their papers are those of the documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lichen.declared import Property
from lichen.server.rules import DECIDES, RULES, RuleSettings

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_declares_what_its_aggregator_does(name: str) -> None:
    rule = RULES[name]
    made = rule.make(RuleSettings(scaling=2.0, energy=0.9))
    assert made.needs == ("sum" if Property.SUMS in rule.allows else "single")
    assert rule.allows <= DECIDES
    moves = bool(rule.freezes or rule.local_params)
    assert (Property.ONE_LAYOUT in rule.allows) != moves


@pytest.mark.parametrize("name", RULES)
def test_a_rule_carries_the_paper_of_the_documents(name: str) -> None:
    known = (DOCS / "methods.md").read_text("utf-8") + (DOCS / "adapting.md").read_text("utf-8")
    assert RULES[name].papers
    for paper in RULES[name].papers:
        assert f"<{paper.url}>" in known


def test_reading_the_table_imports_no_torch() -> None:
    code = "import sys, lichen.server.rules; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
