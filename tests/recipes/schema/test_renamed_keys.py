"""Old names of recipe keys: read for one release, told once in a line, and the same recipe as the new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.recipes.comparison import comparisons, read_comparison
from lichen.recipes.schema.explain import field_of
from lichen.recipes.schema.read import (
    former_sha256,
    gallery,
    read_recipe,
    recipe_sha256,
)
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.renamed_keys import (
    GONE_IN,
    RENAMED_KEYS,
    RENAMED_VALUES,
    REPLACED_KEYS,
    with_new_names,
    with_old_names,
)

ENDPOINT = {"url": "http://127.0.0.1:1/v1", "model": "m"}
EVERYTHING: dict[str, Any] = {
    "task": "classify",
    "model": {"student": {"kind": "text-cnn"}},
    "data": {"name": "rows.jsonl", "public": {"labelled": 10, "unlabelled": 10}},
    "teacher": {"endpoint": ENDPOINT, "kind": "zero-shot", "at": "server"},
    "synthetic": {"endpoint": ENDPOINT},
    "semi": {"kind": "fixmatch"},
}
"""A recipe with every section that has renamed keys but the one below."""
TALK: dict[str, Any] = {
    "task": "classify",
    "model": {"students": [{"kind": "image-mlp"}]},
    "data": {"name": "digits", "public": {"labelled": 0}},
    "exchange": {},
    "compare": {"baselines": []},
}

OLD: dict[str, tuple[str, str]] = {
    "chat-demo": (
        """
name: chat-demo
question: Does one adapter, trained together by 16 people who chat, predict each of them better than their own could?
task: chat
model:
  name: smollm2-135m
  adapter: {targets: [q_proj, v_proj], rank: 8, alpha: 16}
data:
  name: chitchat
  form: transcript
  max_length: 48
  max_clients: 16
  min_rows: 100
  unsplit: drop
  max_rows: 200
  test_rows: 8
  valid: 0.15
  test: 0.2
optimizer: {name: adamw, lr: 5e-3, schedule: cosine}
federation: {rounds: 6, per_round: 8, steps: 3, batch: 4, valid_every: 6}
compare: {columns: [base, alone]}
""",
        "23beb77d705572b44b517b7503319fa166b2aae9ce154b0315c5361c4eedfd14",
    ),
    "digits": (
        """
name: digits
question: Ten clients hold few and unevenly spread digits. Does training together beat training alone?
task: classify
model:
  student: {kind: image-mlp, width: 64}
data:
  name: digits
  partition: {by: dirichlet, clients: 10, alpha: 1.0}
  valid: 0.1
  test: 0.3
  one_class: keep
optimizer: {name: sgd, lr: [0.1, 0.3], momentum: 0.9}
federation: {rounds: 20, steps: 8, batch: 16, aggregate: mean, valid_every: 2}
compare: {columns: [alone, pooled], metric: accuracy, pooled_batch: 32}
""",
        "4387106decf7f84e4893f2ab42085ea2645cc8e526fc5a0de8411f9f3598a2a6",
    ),
    "reviews-teacher": (
        """
name: reviews-teacher
question: How much does a foundation model that only answers help small students with ten labels each?
task: classify
model:
  student: {kind: text-cnn, width: 64}
data:
  name: clothing-reviews
  max_length: 96
  max_clients: 40
  min_rows: 50
  unsplit: drop
  valid: 0.2
  test: 0.4
  split_by: row
  public: {share: 0.5, labelled: 4000, unlabelled: 4000}
  labels: 10
teacher: {name: minilm-l6, top_k: 3, public_batch: 32}
optimizer: {name: adamw, lr: [1e-3, 3e-3], schedule: cosine}
federation: {rounds: 20, per_round: 20, steps: 8, batch: 8, aggregate: mean, weighting: uniform, valid_every: 4}
compare: {columns: [without, alone], metric: macro_f1}
engine: {block: 20}
""",
        "2ac710d055f2f3f5c39c8f7a570e04e6aac51d38ffc3711e92249b4f32ace67f",
    ),
}
"""Recipes as they were written at 0.1.0's last commit with the old names, and their digests at that time."""


def dumped(recipe: Recipe) -> dict[str, Any]:
    values: dict[str, Any] = recipe.model_dump(mode="json")
    return values


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{path}{key}.") if value and isinstance(value, dict) else {f"{path}{key}": value}
    return found


def new_path(old: str) -> str:
    section, dot, _ = old.rpartition(".")
    return f"{section}{dot}{RENAMED_KEYS[old]}"


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_every_new_name_is_a_key_and_no_old_one_is(old: str) -> None:
    assert field_of(Recipe, new_path(old).split(".")) is not None
    assert field_of(Recipe, old.split(".")) is None
    assert new_path(old) not in RENAMED_KEYS, "one step from old to new"


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_every_old_key_is_read_and_told(old: str) -> None:
    base = TALK if old.startswith("exchange.") else EVERYTHING
    every = flat(with_old_names(dumped(read_recipe(base))))
    told: list[str] = []
    value = every[old]
    section, _, last = old.rpartition(".")
    nested: Any = {last: value}
    for step in reversed(section.split(".") if section else []):
        nested = {step: nested}
    page = json.loads(json.dumps(base))
    home, words = page, nested
    while (key := next(iter(words))) in home and isinstance(words[key], dict):
        home, words = home[key], words[key]
    home |= words
    home.pop(RENAMED_KEYS[old], None) if home is not page else None
    assert read_recipe(page, note=told.append) == read_recipe(base)
    assert read_recipe(base, [f"{old}={json.dumps(value)}"], note=told.append) == read_recipe(base)
    assert len(told) == 2
    for line in told:
        assert f"{old} is now {new_path(old)}" in line
        assert GONE_IN in line


@pytest.mark.parametrize("name", gallery())
def test_a_gallery_recipe_by_its_old_names_is_the_same(name: str) -> None:
    recipe = read_recipe(name)
    old = with_old_names(dumped(recipe))
    again = read_recipe(old, note=lambda _: None)
    assert again == recipe
    assert recipe_sha256(again) == recipe_sha256(recipe)
    assert with_new_names(old)[0] == dumped(recipe)
    assert not set(RENAMED_KEYS) & set(flat(dumped(recipe)))


SINCE = {
    "chat-demo": [
        "data.max_rows=200",
        "compare.baselines=[base, alone]",
        "compare.alone_epochs=20",
        "compare.alone_patience=5",
    ],
    "digits": ["compare.baselines=[alone, pooled]"],
    "reviews-teacher": ["compare.baselines=[no_help, alone]"],
}
"""What the recipes have got since under the names of today, taken back."""


@pytest.mark.parametrize("name", OLD)
def test_a_page_of_before_is_the_recipe_of_today(name: str, tmp_path: Path) -> None:
    page, digest = OLD[name]
    (tmp_path / "old.yaml").write_text(page)
    told: list[str] = []
    recipe = read_recipe(tmp_path / "old.yaml", note=told.append)
    today = read_recipe(name, SINCE.get(name, []))
    assert recipe == today
    assert recipe_sha256(recipe) == recipe_sha256(today)
    assert former_sha256(recipe) == digest


@pytest.mark.parametrize("name", comparisons())
def test_the_comparisons_use_new_names(name: str) -> None:
    told: list[str] = []
    read_comparison([name], note=told.append)
    assert told == []


def test_a_comparison_of_before(tmp_path: Path) -> None:
    page = """
base: reviews-few
set: {synthetic: {per_class: 4}}
methods:
  one: {synthetic.noun: review}
  two: {synthetic: {noun: text, per_class: 5}}
"""
    (tmp_path / "old.yaml").write_text(page)
    (tmp_path / "new.yaml").write_text(page.replace("noun", "item_name"))
    told: list[str] = []
    old = read_comparison([tmp_path / "old.yaml"], note=told.append)
    assert len(told) == 1
    assert told[0].count("synthetic.noun is now synthetic.item_name") == 1
    new = read_comparison([tmp_path / "new.yaml"], note=told.append)
    assert len(told) == 1
    assert old.methods == new.methods
    (tmp_path / "both.yaml").write_text(page.replace("{noun: text,", "{noun: text, item_name: text,"))
    with pytest.raises(LichenError, match="is set twice"):
        read_comparison([tmp_path / "both.yaml"], note=told.append)


@pytest.mark.parametrize(
    ("old", "kind"),
    [
        ({"by_class": True}, "flexmatch"),
        ({"by_class": False, "server": False}, "fixmatch"),
        ({"server": True, "by_class": True}, "semifl"),
        ({"server": True}, "semifl"),
    ],
)
def test_switches_that_are_words_of_a_key_now(old: dict[str, bool], kind: str, tmp_path: Path) -> None:
    """Files that name them are read, in a section, as a setting and in a comparison."""
    told: list[str] = []
    recipe = read_recipe({**EVERYTHING, "synthetic": None, "semi": old}, note=told.append)
    assert recipe == read_recipe({**EVERYTHING, "synthetic": None, "semi": {"kind": kind}})
    assert len(told) == 1
    for key, value in old.items():
        assert f"semi.{key} is now semi.kind" in told[0]
        alone = read_recipe({**EVERYTHING, "synthetic": None}, [f"semi.{key}={json.dumps(value)}"], note=told.append)
        assert alone.semi is not None
        assert alone.semi.kind == REPLACED_KEYS[f"semi.{key}"][1].get(value, "fixmatch")
    with pytest.raises(LichenError, match=r"is now semi\.kind, and both are given"):
        read_recipe({**EVERYTHING, "semi": {**old, "kind": kind}}, note=told.append)
    with pytest.raises(LichenError, match=r"semi\.server"):
        read_recipe({**EVERYTHING, "semi": {"server": "yes"}}, note=told.append)


def test_a_comparison_of_before_with_a_switch(tmp_path: Path) -> None:
    page = "base: reviews-few\nset: {semi: {server: false}}\nmethods:\n  one: {semi.by_class: true}\n  two: {}\n"
    (tmp_path / "old.yaml").write_text(page)
    told: list[str] = []
    old = read_comparison([tmp_path / "old.yaml"], note=told.append)
    kinds = {method.name: method.recipe.semi and method.recipe.semi.kind for method in old.methods}
    assert kinds == {"one": "flexmatch", "two": None}
    assert len(told) == 1


def test_a_run_with_a_switch_is_not_taken_for_one_of_today() -> None:
    """What the words mean has changed: whatever of before named no kind is of no digest of now."""
    with pytest.raises(LichenError, match=r"semi\.kind"):
        read_recipe({**EVERYTHING, "semi": {"threshold": 0.7}})
    recipes = [read_recipe({**EVERYTHING, "semi": {"kind": kind}}) for kind in ("fixmatch", "flexmatch")]
    for recipe in recipes:
        for digest in (recipe_sha256, former_sha256):
            assert digest(recipe) != digest(recipe.model_copy(update={"semi": recipe.semi.model_construct()}))
    assert recipe_sha256(recipes[0]) != recipe_sha256(recipes[1])


def test_both_names_at_once_are_refused() -> None:
    both = {**EVERYTHING, "synthetic": {"noun": "review", "item_name": "review"}}
    with pytest.raises(LichenError) as caught:
        read_recipe(both)
    error = caught.value
    assert (error.where, error.what) == ("synthetic.noun", "is now synthetic.item_name, and both are given")
    assert error.fix == "remove synthetic.noun"


def test_a_fault_is_told_by_the_new_name() -> None:
    with pytest.raises(LichenError) as caught:
        read_recipe({**EVERYTHING, "synthetic": {"noun": 3}}, note=lambda _: None)
    assert caught.value.where == "synthetic.item_name"


def test_without_anybody_to_tell_python_warns() -> None:
    with pytest.warns(FutureWarning, match=r"synthetic\.noun is now synthetic\.item_name; the old name goes with"):
        lichen.read_recipe(EVERYTHING, ["synthetic.noun=review"])


def test_the_command_line_tells_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["synthetic={noun: review}", "data.public={labelled: 1000}", "data.labels=0"]
    words = [part for setting in settings for part in ("-s", setting)]
    assert cli.main(["plan", "reviews-few", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "noun" in line] == [
        f"synthetic.noun is now synthetic.item_name; the old name goes with lichen {GONE_IN}"
    ]
    assert any("data.labels" in line for line in told)


def test_words_that_changed_are_told() -> None:
    for key, words in RENAMED_VALUES.items():
        for old, new in words.items():
            values, notes = with_new_names({key.split(".")[0]: {key.split(".")[1]: [old, "alone"]}})
            assert flat(values)[key] == [new, "alone"]
            assert notes == [f"{key}: {old} is now {new}"]
            assert flat(with_old_names(values)).popitem()[1] == [old, "alone"]
