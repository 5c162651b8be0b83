"""Reading recipes: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.recipes.schema import read as reading
from lichen.recipes.schema.read import gallery, read_recipe, recipe_sha256, write_recipe
from lichen.recipes.schema.yaml import dump_yaml, load_yaml

CHAT: dict[str, Any] = {"task": "chat", "model": {"name": "tiny"}, "data": {"name": "rows.jsonl"}}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "r.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(source: Any, *overrides: str) -> LichenError:
    with pytest.raises(LichenError) as caught:
        read_recipe(source, overrides)
    return caught.value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-3", (1e-3,)),
        ("optimizer.lr=[1e-3,2e-3]", (1e-3, 2e-3)),
        ("optimizer.lr=[1, 2.5E-1]", (1.0, 0.25)),
        ("optimizer.lr=.5", (0.5,)),
        ("optimizer.clip=", None),
        ("optimizer.clip=null", None),
        ("federation.rounds=2e1", 20),
        ("model.adapter.target_modules=all-linear", "all-linear"),
        ("model.adapter.target_modules=q_proj", ("q_proj",)),
        ("compare.baselines=base", ("base",)),
        ("compare.baselines=[]", ()),
        ("data.columns.text=body", "body"),
        ("question=a = b", "a = b"),
        ("name='12'", "12"),
        ("name=2024-01-02", "2024-01-02"),
        ("name=no", "no"),
    ],
)
def test_overrides_take_yaml_values(override: str, value: Any) -> None:
    found: Any = read_recipe(CHAT, [override])
    for step in override.partition("=")[0].split("."):
        found = found[step] if isinstance(found, dict) else getattr(found, step)
    assert found == value


def test_later_overrides_win_and_the_source_stays_untouched() -> None:
    before = copy.deepcopy(CHAT)
    assert read_recipe(CHAT, ["seed=1", "seed=2"]).seed == 2
    assert before == CHAT


@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        ("optimzer.lr=1", "optimzer", "did you mean 'optimizer'"),
        ("optimizer.lrr=1", "optimizer.lrr", "did you mean 'lr'"),
        ("rank=3", "rank", "did you mean 'model.adapter.rank'"),
        ("zzz=3", "zzz", "the keys here are: name, question, task"),
        ("data.columns.txt=a", "data.columns.txt", "did you mean 'text'"),
        ("optimizer.lr=fast", "optimizer.lr", "must be a list of numbers, not the text 'fast'"),
        ("optimizer.lr=[1, -1]", "optimizer.lr[1]", "must be more than 0, not -1"),
        ("optimizer.lr=[]", "optimizer.lr", "must not be empty"),
        ("optimizer.lr=[0.1, 1e-1]", "optimizer.lr", "name every learning rate once"),
        ("model.adapter.rank=true", "model.adapter.rank", "must be a whole number, not true"),
        ("model.adapter.rank='8'", "model.adapter.rank", "for example rank: 8"),
        ("model.adapter=", "model.adapter", "must be a section with keys, not nothing"),
        ("model=3", "model", "must be a section with keys, not 3"),
        ("name=3", "name", "put it in quotes"),
        ("task=chatt", "task", "did you mean 'chat'? use one of: chat, classify, oneshot"),
        ("seed=.nan", "seed", "must be a finite number"),
        ("model.student={}", "model.student.kind", "is missing"),
        ("data.valid=0.9", "data", "keep their sum below 1"),
        ("teacher.top_k=3", "teacher.answer_format", "set it to text"),
        ("federation.sampling=poisson", "federation.sampling", "set federation.clients_per_round"),
        ("seed", "-s seed", "write it like -s optimizer.lr=1e-3"),
        ("a b=1", "-s a b=1", "is not key=value"),
        ("data.name.x=1", "data.name.x", "data.name is a value, not a section"),
        ("optimizer.lr=[1", "-s optimizer.lr=[1, line 1, column 3", "bracket that is not closed"),
    ],
)
def test_a_refusal_names_key_reason_and_fix(override: str, where: str, words: str) -> None:
    error = refused(CHAT, override)
    assert error.where == where
    assert words in str(error)


def test_one_problem_is_told_and_the_others_counted() -> None:
    error = refused({**CHAT, "data": {"nmae": "x"}, "seed": -1})
    assert error.where == "data.nmae"
    assert "and 2 more problems" in error.what
    assert "did you mean 'name'" in error.fix


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("task: chat\ntask: chat\n", "line 2, column 1", "has the key 'task' twice"),
        ("task: chat\nmodel: {name: a, name: b}\n", "line 2, column 18", "has the key 'name' twice"),
        ("task: chat\n\tmodel: x\n", "line 2, column 1", "indented with a tab"),
        ("task: chat\nmodel:\n   name: a\n  dtype: b\n", "line 4, column 3", "indented"),
        ("task: [chat\n", "line 2, column 1", "bracket"),
        ("task: 'chat\n", "line 2, column 1", "quote"),
        ("task: a: b\n", "line 1, column 8", "':'"),
        ("a: &x [1]\nb: *x\n", "line 1, column 4", "anchor"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4", "tag"),
        ("? [a, b]\n: c\n", "line 1, column 3", "not a name"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1", "second document"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", "line 1, column 19", "nested"),
        ("seed: " + "9" * 5000 + "\n", "line 1, column 7", "digits"),
        ("a: \x00\n", "line 1", "no text"),
    ],
)
def test_bad_yaml_is_told_with_line_and_column(tmp_path: Path, text: str, place: str, words: str) -> None:
    path = write(tmp_path, text)
    error = refused(path)
    assert error.where == f"{path}, {place}"
    assert words in error.what
    assert error.fix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"- 1\n", "not a recipe"),
        (b"hello\n", "not a recipe"),
        (b"\xff\xfe\x00\x80", "not a text file"),
        (b"a: 1\n" * 100_000, "larger than"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    error = refused(write(tmp_path, content))
    assert words in error.what
    assert error.where.endswith("r.yaml")


def test_an_alias_bomb_costs_nothing(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert "anchor" in refused(write(tmp_path, "\n".join(lines))).what


def test_missing_files_folders_and_odd_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "gallery", lambda: {"chitchat": tmp_path / "chitchat.yaml"})
    error = refused("chitcat")
    assert error.where == "chitcat"
    assert "did you mean 'chitchat'" in error.fix
    assert "is a folder" in refused(tmp_path).what
    write(tmp_path, "x: 1").rename(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in refused(tmp_path).fix
    assert "no such recipe" in refused("x" * 5000).what
    assert "no such recipe" in refused("a\0b").what
    assert "no such recipe" in refused("").what or "is a folder" in refused("").what
    assert "cannot be read from a int" in refused(3).what


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", math.inf, {1: 2}, "\ud800"])
def test_python_values_that_are_no_yaml(value: Any) -> None:
    assert refused({**CHAT, "model": {"name": value}}).where == "model.name"


def test_a_gallery_name_reads_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.yaml").write_text(dump_yaml(CHAT))
    monkeypatch.setattr(reading, "gallery", lambda: {"small": tmp_path / "small.yaml"})
    assert read_recipe("small") == read_recipe(CHAT)


def test_every_shipped_recipe_reads() -> None:
    for name in gallery():
        assert read_recipe(name).name == name


def test_paths_beside_the_recipe_win_over_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("{}\n")
    (work / "other.jsonl").write_text("{}\n")
    monkeypatch.chdir(work)
    path = write(home, dump_yaml(CHAT))
    assert read_recipe(path).data.name == str((home / "rows.jsonl").resolve())
    assert read_recipe(path, ["data.name=rows.jsonl"]).data.name == "rows.jsonl"
    assert read_recipe({**CHAT, "data": {"name": "other.jsonl"}}).data.name == "other.jsonl"
    path.write_text(dump_yaml({**CHAT, "data": {"name": "other.jsonl"}}))
    assert read_recipe(path).data.name == "other.jsonl"


def test_a_catalog_name_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "chitchat").mkdir()
    path = write(tmp_path, dump_yaml({**CHAT, "data": {"name": "chitchat"}}))
    assert read_recipe(path).data.name == "chitchat"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    name=texts | st.sampled_from(["1e-3", "no", "null", "~", "010", "1_0", "2024-01-01", "- a", "a: b", "#", "1:30"]),
    lr=st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**31 - 1),
)
def test_what_is_written_reads_back_equal(
    name: str, lr: list[float], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = read_recipe({**CHAT, "name": name, "seed": seed, "optimizer": {"lr": lr}})
    assert recipe.name == name
    path = write(tmp_path_factory.mktemp("r"), write_recipe(recipe))
    again = read_recipe(path)
    assert again == recipe
    assert recipe_sha256(again) == recipe_sha256(recipe)
    assert yaml.safe_load(write_recipe(recipe))["task"] == "chat"


def test_the_digest_ignores_spelling_and_sees_values() -> None:
    plain = recipe_sha256(read_recipe(CHAT))
    assert plain == recipe_sha256(
        read_recipe({**dict(reversed(CHAT.items())), "optimizer": {"lr": [1e-3]}, "seed": 0.0})
    )
    assert plain != recipe_sha256(read_recipe(CHAT, ["seed=1"]))
    assert len(plain) == 64


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_yaml_or_a_lichen_error(text: str) -> None:
    try:
        value, where = load_yaml(text, where="here"), "here"
    except LichenError as error:
        value, where = None, error.where
    assert where.startswith("here")
    assert value is None or isinstance(value, (dict, list, str, int, float, bool))


@pytest.mark.parametrize("word", ["int5", "topk:0/4", "sketch"])
def test_a_codec_that_is_none_is_refused_by_its_key(word: str) -> None:
    with pytest.raises(LichenError, match=r"wire\.up: no codec is called"):
        read_recipe(CHAT, [f"wire.up=['{word}']"])


@pytest.mark.parametrize(
    ("word", "where", "told"),
    [
        ("model.students=3", "model.students", "must be a list of sections"),
        ("model.students=[{kind: cnn}]", "model.students[0].kind", "use one of: text-cnn"),
        ("model.students=[{kid: text-cnn}]", "model.students[0].kid", "did you mean 'kind'"),
        ("model.students=[{kind: text-cnn, width: 0}]", "model.students[0].width", "must be at least 1"),
        ("teacher.layers=3", "teacher.layers", "keys with a whole number each"),
        ("synthetic.attributes={tone: 3}", "synthetic.attributes.tone", "keys with a list each"),
    ],
)
def test_slips_in_lists_of_sections_and_in_free_keys(word: str, where: str, told: str) -> None:
    with pytest.raises(LichenError) as caught:
        read_recipe("digits-unequal", [word])
    assert caught.value.where == where
    assert told in str(caught.value)
