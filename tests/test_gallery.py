"""The recipes that come with lichen: each says what it asks, and the one for learning answers it."""

from __future__ import annotations

from pathlib import Path

import pytest

import lichen
from lichen.present.summary import check_summary, read_summary
from lichen.present.trace import read_trace
from lichen.recipes.schema.read import gallery


@pytest.mark.parametrize("name", sorted(gallery()))
def test_every_recipe_has_a_question_and_a_task(name: str) -> None:
    recipe = lichen.read_recipe(name)
    assert recipe.name == name
    assert recipe.question.rstrip().endswith("?")
    assert recipe.task in ("chat", "classify", "oneshot")
    assert gallery()[name].read_text().startswith("# ")  # a line for the reader


def test_digits_together_beat_digits_alone(tmp_path: Path) -> None:
    recipe = lichen.read_recipe("digits", ["federation.rounds=6", "optimizer.lr=[0.3]", "compare.baselines=[alone]"])
    result = lichen.run(recipe, out=tmp_path / "digits")
    assert check_summary(result.summary) == read_summary(result.folder)
    columns = result.summary["columns"]
    assert columns["federated"]["mean"] > columns["alone"]["mean"] + 0.1
    # One model on one test set is no worse for anybody; alone, everybody has a model of its own.
    assert columns["federated"]["worst_decile"] is None
    assert columns["alone"]["worst_decile"] < columns["alone"]["mean"] < columns["federated"]["mean"]
    training = result.summary["training"]
    assert training["federated"]["rounds"] == training["federated"]["of"] == 6
    assert 1 <= training["federated"]["kept"] <= 6
    assert training["alone"]["kept"] is None
    assert result.summary["share_gaining"] == 1.0
    each = str(result.summary["extra"]["test rows by class"])
    tested = dict(pair.split() for pair in each.split(", "))
    assert list(tested) == [str(digit) for digit in range(10)]
    assert sum(int(count) for count in tested.values()) == 539  # 0.3 of 1,797, and of each digit's 174 to 183
    assert all(51 <= int(count) <= 56 for count in tested.values())
    assert result.summary["clients"] == 10
    assert [e.report.round for e in read_trace(result.folder) if e.column == "federated"] == list(range(1, 7))
    assert {f.name for f in result.folder.iterdir()} >= {"summary.json", "curves.png", "clients.png", "model"}
