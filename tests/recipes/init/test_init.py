"""A first recipe for the user's data: the guesses, and that every guess is a recipe that reads."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from lichen.clients.methods import METHODS
from lichen.core.errors import LichenError
from lichen.recipes.init.init import guess, init_recipe
from lichen.recipes.init.names import Wishes
from lichen.recipes.rows.prepare import gather, split_clients
from lichen.recipes.schema.explain import section_of
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.yaml import load_yaml


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_for(data: Path) -> Recipe:
    path = data.parent / "made.yaml"
    path.write_text(init_recipe(data))
    return read_recipe(path)


CHAT = [{"user": f"u{i % 3}", "prompt": "hello you", "completion": f"hi {i}", "thread": i // 2} for i in range(12)]
CLASSES = [{"Review Text": f"a long text, number {i}", "rating": i % 5 + 1, "Clothing ID": i % 3} for i in range(40)]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_prompts_and_answers(tmp_path: Path) -> None:
    recipe = recipe_for(jsonl(tmp_path / "a.jsonl", CHAT))
    assert (recipe.task, recipe.model.name, recipe.data.form) == ("chat", "smollm2-135m", "chat")
    assert recipe.data.columns == {"client": "user", "prompt": "prompt", "completion": "completion", "group": "thread"}
    assert (recipe.data.partition.by, recipe.data.split_by) == ("client", "group")


def test_messages(tmp_path: Path) -> None:
    recipe = recipe_for(jsonl(tmp_path / "a.jsonl", [{"messages": TALK, "site": "x"}] * 3))
    assert (recipe.data.form, recipe.data.columns) == ("messages", {"messages": "messages", "client": "site"})


@pytest.mark.parametrize("ending", ["csv", "parquet", "json"])
def test_labels_in_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"b.{ending}"
    if ending == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, CLASSES[0].keys())
            writer.writeheader()
            writer.writerows(CLASSES)
    elif ending == "json":
        path.write_text(json.dumps(CLASSES))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(CLASSES), path)
    recipe = recipe_for(path)
    assert (recipe.task, recipe.model.name) == ("classify", "minilm-l6")
    assert recipe.data.columns == {"text": "Review Text", "label": "rating"}
    assert recipe.data.partition.by == "iid"
    assert recipe.model.adapter.modules_to_save == ("classifier",)


def test_a_folder_with_a_file_a_client(tmp_path: Path) -> None:
    home = tmp_path / "clients"
    home.mkdir()
    for name in ("ann", "bob"):
        jsonl(home / f"{name}.jsonl", [{"words": "some words of a person"}] * 4)
    recipe = recipe_for(home)
    assert (recipe.data.columns, recipe.data.partition.by) == ({"text": "words"}, "client")


def test_every_key_is_there_with_its_description(tmp_path: Path) -> None:
    text = init_recipe(jsonl(tmp_path / "a.jsonl", CHAT), full=True)
    for name, field in Recipe.model_fields.items():
        assert f"\n{name}:" in text or f"\n# {name}:" in text or f"\n# ({name}:" in text
        assert field.description is None or f"# {field.description.split(';')[0]}" in text
    assert f"(one of: {', '.join(METHODS)})" in text.replace("\n  # ", " ")
    assert "u0" not in text


def test_only_the_head_is_read(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", CHAT * 2_000)
    with open(path, "ab") as file:
        file.write(b"\xff this is no JSON")
    assert recipe_for(path).task == "chat"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", b"{\n", "is not valid JSON"),
        ("a.jsonl", b"3\n", "is a number, not an object"),
        ("a.jsonl", b'{"n": 1}\n', "has no column with text"),
        ("a.jsonl", b"\xff\xfe\n", "is not whole UTF-16"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.csv", b"n,m\n1,2\n", "has no column with text"),
        ("a.csv", b"text,label\n", "has no rows"),
        ("a.parquet", b"nonsense", "is not a readable parquet file"),
        ("a.xlsx", b"", "is an Excel file"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LichenError, match=words) as caught:
        init_recipe(path)
    assert caught.value.fix
    assert str(path) in caught.value.where


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="no such file"):
        init_recipe(tmp_path / "none.csv")
    with pytest.raises(LichenError, match="holds no data files"):
        init_recipe(tmp_path)


def uncommented(text: str) -> list[tuple[str, str]]:
    """The recipe once for each key behind a ``#``, with that one in force."""
    lines = text.splitlines()
    found = []
    for at, line in enumerate(lines):
        example = re.match(r"^( *)# ([a-z_]+: .*)$", line)
        if example is None or not any(example[2].startswith(f"{key}: ") for key in KEYS):
            continue
        found.append((example[2], "\n".join([*lines[:at], example[1] + example[2], *lines[at + 1 :]])))
    return found


def every_key(section: type[BaseModel]) -> set[str]:
    found = set(section.model_fields)
    for field in section.model_fields.values():
        inner = section_of(field.annotation)
        found |= every_key(inner) if inner is not None else set()
    return found


KEYS = every_key(Recipe)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rows", [CHAT, CLASSES, [{"messages": TALK, "site": "x"}] * 3])
def test_every_example_behind_a_hash_is_a_key_that_reads(tmp_path: Path, rows: list[Any], *, full: bool) -> None:
    text = init_recipe(jsonl(tmp_path / "a.jsonl", rows), full=full)
    plain = read_recipe(load_yaml(text, where="recipe"))
    examples = uncommented(text)
    assert len(examples) >= (15 if full else 2)
    for example, changed in examples:
        assert "some text" not in example
        assert read_recipe(load_yaml(changed, where=example)) != plain, example


@pytest.mark.parametrize("rows", [CHAT, CLASSES, [{"messages": TALK, "site": "x"}] * 3])
def test_the_short_recipe_is_a_page_and_means_what_the_full_one_does(tmp_path: Path, rows: list[Any]) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows)
    short, full = init_recipe(path), init_recipe(path, full=True)
    assert len(short.splitlines()) <= 40 < len(full.splitlines())
    assert read_recipe(load_yaml(short, where="short")) == read_recipe(load_yaml(full, where="full"))


def test_rows_are_long_enough_for_prompt_and_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "a long question with many words " * 24, "completion": "yes"}] * 20
    assert recipe_for(jsonl(tmp_path / "a.jsonl", rows)).data.max_length == 256
    found = guess(jsonl(tmp_path / "b.jsonl", [{"prompt": "word " * 9000, "completion": "yes"}] * 20))
    assert any("100 % of the rows are longer than 1024 tokens" in line for line in found.lines)


ASKED = [
    {"body": f"some words of text number {i}", "wing": "we"[i % 2], "mood": "ab"[i % 2], "State": "xyz"[i % 3]}
    for i in range(30)
]


def test_a_person_is_asked_where_several_answers_are_as_good(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ASKED)
    heard: list[tuple[str, list[str]]] = []

    def ask(question: str, answers: Sequence[str]) -> int:
        heard.append((question, list(answers)))
        return 1 if "label" in question else 0

    found = guess(path, ask=ask)
    assert found.values["data"]["columns"] == {"client": "State", "text": "body", "label": "mood"}
    assert [answers for _, answers in heard] == [
        ["wing (2 classes)", "mood (2 classes)", "none: learn to write such texts"],
        ["State (3 clients)", "none: deal rows out at random"],
    ]
    alone = guess(path)
    assert alone.values["task"] == "chat"
    assert any("wing: could be the label: --label 'wing'" in line for line in alone.lines)
    assert any("mood: could be the label: --label 'mood'" in line for line in alone.lines)


@pytest.mark.parametrize(
    ("wishes", "columns", "task"),
    [
        (Wishes(label="mood"), {"text": "body", "label": "mood", "client": "State"}, "classify"),
        (Wishes(client="wing"), {"text": "body", "label": "mood", "client": "wing"}, "classify"),
        (Wishes(text="mood"), {"text": "mood", "label": "wing", "client": "State"}, "classify"),
        (Wishes(text="mood", task="chat"), {"text": "mood", "client": "State"}, "chat"),
        (
            Wishes(prompt=("wing", "mood"), completion="body"),
            {"prompt": ["wing", "mood"], "completion": "body", "client": "State"},
            "chat",
        ),
        (Wishes(task="oneshot", label="wing"), {"text": "body", "label": "wing", "client": "State"}, "oneshot"),
    ],
)
def test_what_the_user_says_is_obeyed(tmp_path: Path, wishes: Wishes, columns: dict[str, Any], task: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", ASKED)
    recipe = read_recipe(load_yaml(init_recipe(path, wishes=wishes), where="recipe"))
    found = {role: list(some) if isinstance(some, tuple) else some for role, some in recipe.data.columns.items()}
    assert (found, recipe.task) == (columns, task)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        (Wishes(label="moods"), "--label: no column 'moods'"),
        (Wishes(task="classify"), "--label NAME"),
        (Wishes(text="body", completion="mood"), "goes without --completion"),
    ],
)
def test_a_wish_that_does_not_fit_is_told(tmp_path: Path, wishes: Wishes, words: str) -> None:
    with pytest.raises(LichenError) as caught:
        init_recipe(jsonl(tmp_path / "a.jsonl", ASKED), wishes=wishes)
    assert words in str(caught.value)


def test_a_model_of_the_users_own_is_adapted_whatever_its_layers_are_called(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", CHAT)
    recipe = read_recipe(load_yaml(init_recipe(path, wishes=Wishes(model="org/model")), where="recipe"))
    assert (recipe.model.name, recipe.model.adapter.target_modules) == ("org/model", "all-linear")


def test_a_first_run_of_many_rows_is_short_and_says_so(tmp_path: Path) -> None:
    rows = [{"text": f"some words of number {i}", "label": "ab"[i % 2], "user": f"u{i % 3}"} for i in range(2000)]
    found = guess(jsonl(tmp_path / "a.jsonl", rows))
    assert (found.values["data"]["max_rows"], found.values["data"]["test_rows"]) == (300, 50)
    assert "At most 300 rows of a client are used, so that a first run is short (data.max_rows)." in found.lines
    assert found.values["model"]["head"] == "ridge"
    few = guess(jsonl(tmp_path / "b.jsonl", rows[:300]))
    assert not {"max_rows", "test_rows"} & few.values["data"].keys()


def test_rows_that_cannot_take_part_are_counted_and_the_recipe_leaves_them_out(tmp_path: Path) -> None:
    rows = [{"text": f"some words of number {i}", "label": "ab"[i % 2], "user": f"u{i % 3}"} for i in range(90)]
    rows += [{"text": f"one of few {i}", "label": "a", "user": "rare"} for i in range(4)]
    rows += [{"text": f"one class {i}", "label": "a", "user": "plain"} for i in range(12)]
    rows += [{"text": "no label here", "label": None, "user": "u0"}, {"text": " ", "label": "a", "user": "u0"}]
    found = guess(jsonl(tmp_path / "a.jsonl", rows))
    reported = "\n".join(found.lines)
    for words in (
        "1 of 5 clients have fewer than 10 rows and stay out.",
        "1 of 4 clients have rows of one class only and stay out.",
        "1 of 107 rows have no label and stay out (data.classes).",
        "1 rows without text will be dropped",
    ):
        assert words in reported
    data = found.values["data"]
    assert (data["min_rows"], data["on_too_few_rows"], data["on_single_class"], data["classes"]) == (
        10,
        "drop",
        "drop",
        ["a", "b"],
    )
    recipe = read_recipe(load_yaml(found.recipe(), where="recipe"))
    assert [client_data.name for client_data in split_clients(recipe, gather(recipe))] == ["u0", "u1", "u2"]
