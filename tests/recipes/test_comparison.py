"""Comparisons on a page of YAML: what wins, what is refused, and never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.recipes.comparison import Comparison, comparisons, read_comparison
from lichen.recipes.schema.read import gallery
from lichen.recipes.schema.yaml import dump_yaml

PAGE = """
question: Which?
base: digits
set: {federation.rounds: 4, optimizer: {lr: 0.3}}
seeds: [3, 4]
methods:
  plain:
  momentum: {federation.server.momentum: 0.5}
  nested: {federation: {server: {name: adam, lr: 0.03}, rounds: 6}}
"""


def write(folder: Path, text: str, name: str = "page.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", sorted(comparisons()))
def test_those_that_come_along_are_read(name: str) -> None:
    known = read_comparison([name])
    assert known.question.endswith("?")
    assert known.name == name
    assert len(known.methods) >= 2
    assert name not in gallery()


def test_the_later_word_wins(tmp_path: Path) -> None:
    known = read_comparison([write(tmp_path, PAGE)])
    plain, momentum, nested = known.methods
    assert (known.name, known.question, known.seeds) == ("page", "Which?", (3, 4))
    assert [method.name for method in known.methods] == ["plain", "momentum", "nested"]
    assert [m.recipe.federation.rounds for m in known.methods] == [4, 4, 6]
    assert [m.recipe.name for m in known.methods] == ["plain", "momentum", "nested"]
    assert plain.recipe.optimizer.lr == (0.3,)
    assert plain.recipe.optimizer.momentum == 0.9, "a nested section leaves what it does not name"
    assert (momentum.recipe.federation.server.momentum, momentum.recipe.federation.server.name) == (0.5, "sgd")
    assert (nested.recipe.federation.server.lr, nested.recipe.federation.local_steps) == (0.03, 8)
    assert {m.recipe.seed for m in known.methods} == {0}
    quick = read_comparison([write(tmp_path, PAGE)], overrides=["federation.rounds=1"], seeds=[7])
    assert ({m.recipe.federation.rounds for m in quick.methods}, quick.seeds) == ({1}, (7,))


def test_the_base_lies_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    write(tmp_path, "task: chat\nmodel: {name: tiny}\ndata: {name: rows.jsonl}\n", "mine.yaml")
    (tmp_path / "rows.jsonl").write_text("")
    known = read_comparison([write(tmp_path, "base: mine.yaml\nmethods: {a: }\n")])
    assert known.methods[0].recipe.data.name == str(tmp_path / "rows.jsonl")
    assert known.seeds == (0, 1, 2)


def test_recipes_stand_pair_of(tmp_path: Path) -> None:
    known = read_comparison(["reviews-lora", "reviews-oneshot"])
    assert [m.name for m in known.methods] == ["reviews-lora", "reviews-oneshot"]
    assert known.name == "reviews-lora-reviews-oneshot"
    assert read_comparison(["digits"]).question == read_comparison(["digits"]).methods[0].recipe.question


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (PAGE.replace("seeds", "seds"), r"page.yaml: seds: unknown key\n  fix: did you mean 'seeds'"),
        (PAGE.replace("base: digits", ""), r"page.yaml: base: is missing"),
        (PAGE.replace("base: digits", "base: digit"), r"page.yaml: base: digit: no such recipe\n.*'digits'"),
        (PAGE.replace("base: digits", "base: [1]"), r"page.yaml: base: must be"),
        (PAGE.replace("momentum: 0.5", "momentum: 5"), r"methods.momentum: federation.server.momentum: must be"),
        (PAGE.replace("server.momentum", "servr.momentum"), r"methods.momentum: federation.servr: .*\n.*'server'"),
        (PAGE.replace("plain:", "plain: 3"), r"methods.plain: must hold keys"),
        (PAGE.replace("plain:", "plain: {seed: 3}"), r"methods.plain: every method runs with the same seeds"),
        (PAGE.replace("plain:", "plain: {name: x}"), r"methods.plain: name: is the method's own"),
        (PAGE.replace("plain:", "../plain:"), r"'../plain' cannot be a name"),
        (PAGE.replace("plain:", "plain: {a b: 1}"), r"methods.plain: has the key 'a b'"),
        (PAGE.replace("0.5}", "0.5, federation: {server.momentum: 0.4}}"), r"federation.server.momentum: is set twice"),
        (PAGE.replace("server.momentum: 0.5", "rounds: 4"), r"methods.momentum: is the same recipe as plain"),
        (PAGE.replace("[3, 4]", "[3, 3]"), r"seeds: must be different whole numbers"),
        (PAGE.replace("[3, 4]", "[true]"), r"seeds: must be different whole numbers"),
        (PAGE.replace("[3, 4]", "[]"), r"seeds: must be different whole numbers"),
        (PAGE.replace("Which?", "[1]"), r"question: must be a text"),
        ("base: digits\nmethods: [a, b]\n", r"methods: must hold a name"),
        ("base: digits\n", r"methods: must hold a name"),
        ("base: digits\nmethods: {a: }\nmethods: {b: }\n", r"line 3.*twice"),
        ("base: digits\nmethods: {a: \n", r"page.yaml, line 3.*: is not valid YAML"),
        ("task: chat\nmodle: {name: x}\n", r"modle: unknown key"),
    ],
)
def test_a_fault_names_its_method_and_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(LichenError, match=told) as caught:
        read_comparison([write(tmp_path, text)])
    assert caught.value.fix


def test_sources_that_do_not_go_together(tmp_path: Path) -> None:
    page = write(tmp_path, PAGE)
    for sources, told in (
        ([page, "digits"], "stands beside others"),
        (["digits", "digits"], "two recipes are called 'digits'"),
        ([], "no recipe"),
        (["nosuch"], "no such recipe"),
        ([str(tmp_path)], "is a folder"),
    ):
        with pytest.raises(LichenError, match=told):
            read_comparison(sources)
    with pytest.raises(LichenError, match="same seeds"):
        read_comparison(["digits"], overrides=["seed=3"])
    with pytest.raises(LichenError, match="must be different whole numbers"):
        read_comparison(["digits"], seeds=[1, 1])


KEYS = st.sampled_from(
    ["name", "question", "base", "set", "seeds", "methods", "federation", "federation.rounds", "data", "x", "", "a.b"]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.floats(), st.text(max_size=4), st.sampled_from(["digits", "mean"])
)
TREES = st.recursive(
    LEAVES, lambda t: st.one_of(st.lists(t, max_size=3), st.dictionaries(KEYS, t, max_size=3)), max_leaves=8
)


@settings(max_examples=80)
@given(page=st.dictionaries(KEYS, TREES, max_size=6), sane=st.booleans())
def test_whatever_stands_there_is_read_or_told_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, page: dict[str, Any], sane: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = dump_yaml({**page, **({"base": "digits"} if sane else {}), "methods": page.get("methods")})
    told: Comparison | LichenError
    try:
        told = read_comparison([write(folder, text)])
    except LichenError as error:
        told = error
    if isinstance(told, LichenError):
        assert told.what and told.fix and "\n" not in told.what  # noqa: PT018
    else:
        assert told.methods


LEVELS = """
question: When?
base: digits
levels:
  few: {data.labels: 5}
  many: {data.labels: 50, federation.rounds: 3}
methods:
  plain: {compare.baselines: [alone]}
  momentum: {federation.server.momentum: 0.5, federation.rounds: 7}
at: {momentum: [many]}
also: {alone: plain}
"""


def test_every_method_at_every_level_it_is_asked_at(tmp_path: Path) -> None:
    known = read_comparison([write(tmp_path, LEVELS)])
    assert known.levels == ("few", "many")
    assert [m.name for m in known.methods] == ["plain@few", "plain@many", "momentum@many"]
    assert [m.recipe.data.labels for m in known.methods] == [5, 50, 50]
    assert known.methods[2].recipe.federation.rounds == 7, "the method's word is later than its level's"
    assert [m.also for m in known.methods] == [(("alone", "alone"),), (("alone", "alone"),), ()]


def test_a_column_of_several_methods_is_a_row_of_each(tmp_path: Path) -> None:
    known = read_comparison([write(tmp_path, LEVELS.replace("alone: plain", "alone: [plain, momentum]"))])
    assert {m.name: m.also for m in known.methods} == {
        "plain@few": (("plain.alone", "alone"),),
        "plain@many": (("plain.alone", "alone"),),
        "momentum@many": (("momentum.alone", "alone"),),
    }


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("momentum: [many]", "momentum: [some]", "at.momentum"),
        ("momentum: [many]", "nobody: [many]", "at.nobody"),
        ("alone: plain", "alone: nobody", "also.alone"),
        ("alone: plain", "plain: plain", "also.plain"),
        ("alone: plain", "alone: [plain, nobody]", "also.alone"),
        ("few: {data.labels: 5}", "few: {data.labels: 0}", "level few: data.labels"),
        ("few: {data.labels: 5}", "few@2: {data.labels: 5}", "levels.few@2"),
    ],
)
def test_a_slip_in_the_levels_is_named(tmp_path: Path, old: str, new: str, place: str) -> None:
    assert old in LEVELS
    with pytest.raises(LichenError) as caught:
        read_comparison([write(tmp_path, LEVELS.replace(old, new))])
    assert place in str(caught.value.where)
    assert caught.value.fix
