"""What people's files are taken for, and that a run reads them as ``init`` did; and what damage does to them."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.sources.records import load_records
from lichen.recipes.init.init import guess
from lichen.recipes.init.names import Wishes
from lichen.recipes.rows.prepare import Gathered, gather, gather_all
from lichen.recipes.rows.public import PublicSplit, split_public
from lichen.recipes.rows.reading import report_read
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.yaml import load_yaml
from support.file_shapes import SHAPES, Shape, jsonl, many, said


def test_there_are_sixty() -> None:
    assert len(SHAPES) >= 60


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_taken_for_what_it_is(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    path = shape.write(tmp_path)
    if shape.refused:
        with pytest.raises(LichenError, match=shape.refused) as caught:
            guess(path, Wishes(**shape.flags))
        assert caught.value.fix
        return
    found = guess(path, Wishes(**shape.flags))
    recipe = read_recipe(load_yaml(found.recipe(), where=name))
    columns = {role: list(some) if isinstance(some, tuple) else some for role, some in recipe.data.columns.items()}
    assert (columns, recipe.task) == (shape.columns, shape.task)
    records = gather(recipe)
    assert len(records) == shape.rows
    clients = {record.client for record in records} - {""}
    assert len(clients) == shape.clients
    assert recipe.data.partition.by == ("client" if clients else "iid")
    assert all(record.text or record.messages or record.features is not None for record in records)
    if recipe.task == "classify":
        assert len({record.label for record in records} - {None}) >= 2
    screen = "\n".join(found.lines)
    assert f"task {shape.task}" in screen
    for columns_of_role in columns.values():
        for column in [columns_of_role] if isinstance(columns_of_role, str) else columns_of_role:
            assert column in screen


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("semicolons", "cells parted by ';'"),
        ("UTF-16", "UTF-16, cells parted by tabs"),
        ("Windows-1252", "Windows-1252"),
        ("complaints", "left out   Complaint ID: ids"),
        ("complaints", "  time       Date received"),
        ("complaints", "left out   State: could be the client: --client 'State'"),
        ("complaints", "left out   Link: addresses"),
        ("ShareGPT", "left out   id: ids"),
        ("OpenAI with tools", "left out   tools: tools: their definitions are not given to the model"),
        ("amounts as labels", "left out   label: real numbers"),
        ("Dolly", "left out   category: words"),
        ("what systems leave behind", "left out, no data: README.md"),
        ("parts of nobody", "No column tells clients apart"),
    ],
)
def test_what_was_assumed_and_left_out_is_on_the_screen(tmp_path: Path, name: str, words: str) -> None:
    assert words in "\n".join(guess(SHAPES[name].write(tmp_path)).lines)


def test_a_run_tells_what_init_told_about_the_files(tmp_path: Path) -> None:
    path = SHAPES["semicolons"].write(tmp_path)
    recipe = read_recipe(load_yaml(guess(path).recipe(), where="recipe"))
    gathered = gather_all(recipe)
    lines = told_lines(recipe, gathered, split_public(recipe, gathered.records))
    assert "a.csv: read as cells parted by ';'" in lines
    assert "a.csv: read as cells parted by ';'" in guess(path).lines


def test_rows_of_no_client_are_refused_or_left_out_and_told(tmp_path: Path) -> None:
    rows = many(lambda i: {"text": said(i), "label": "ab"[i % 2], "user": f"u{i // 2 % 2}" if i else ""}, 48)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(rows))
    found = guess(path)
    assert "1 of 48 rows name no client and stay out." in found.lines
    recipe = read_recipe(load_yaml(found.recipe(), where="recipe"))
    assert recipe.data.on_too_few_rows == "drop"
    gathered = gather_all(recipe)
    public_split = split_public(recipe, gathered.records)
    assert [client_data.name for client_data in public_split.clients_data] == ["u0", "u1"]
    assert any("1 row: no client is named" in line for line in told_lines(recipe, gathered, public_split))
    strict = read_recipe(load_yaml(found.recipe(), where="recipe"), ["data.on_too_few_rows=refuse"])
    with pytest.raises(LichenError, match="1 of 48 rows do not name their client") as caught:
        split_public(strict, gathered.records)
    assert "data.on_too_few_rows: drop" in caught.value.fix


def told_lines(recipe: Recipe, gathered: Gathered, public_split: PublicSplit) -> list[str]:
    heard: list[str] = []
    report_read(recipe, gathered, public_split, None, heard.append)
    return heard


def test_conversations_keep_who_said_what(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    first = load_records(str(SHAPES["ShareGPT"].write(tmp_path / "s")), columns={"messages": "conversations"})[0]
    assert [turn["role"] for turn in first.messages] == ["user", "assistant"]
    first = load_records(str(SHAPES["Alpaca"].write(tmp_path)), columns=dict(SHAPES["Alpaca"].columns))[0]
    assert first.prompt == "Translate sentence 0\n\nthe lamp was broken, and this is sentence number 0 of many"
    assert first.text == "phrase 0"


# Damage: each mutation takes bytes and a generator.


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        if changed:
            changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data) + 1))
    return data[:at] + b"\0" * int(rng.integers(1, 4)) + data[at:]


def swapped(data: bytes, rng: np.random.Generator) -> bytes:
    text = data.decode("utf-8", "replace")
    name = ("utf-16", "utf-16-be", "utf-32", "cp1252", "utf-7", "shift_jis")[int(rng.integers(6))]
    return text.encode(name, "replace")


def repeated(data: bytes, rng: np.random.Generator) -> bytes:
    begin, end = sorted(int(at) for at in rng.integers(len(data) + 1, size=2))
    return data[:end] + data[begin:end] * int(rng.integers(1, 4)) + data[end:]


def marked(data: bytes, rng: np.random.Generator) -> bytes:
    marks = (b'"', b"'", b"{", b"]", b",", b"\n", b"\r", b"\\", b"\x1b[31m", b"NaN", b"\xff", b"-1e999", b"null")
    at = int(rng.integers(len(data) + 1))
    return data[:at] + marks[int(rng.integers(len(marks)))] + data[at:]


MUTATIONS = (cut, flipped, zeroed, swapped, repeated, marked)


@contextmanager
def bounded(seconds: int, what: str) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"{what} took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(read: Callable[[], object]) -> LichenError | None:
    try:
        read()
    except LichenError as error:
        return error
    return None


def outcome(shape: Shape, folder: Path) -> str:
    """How a damaged shape ends, for init and for reading; anything but a LichenError is a failure."""
    path = shape.write(folder)
    ends = []
    for read in (
        lambda: guess(path, Wishes(**shape.flags)).recipe(),
        lambda: load_records(str(path), columns=dict(shape.columns), path_client="auto"),
    ):
        error = refusal(read)
        ends.append("read" if error is None else "refused")
        if error is not None:
            assert error.what
            assert error.fix
            assert len(str(error)) < 3200
            assert str(error).replace("\n", "").replace("\xa0", "").isprintable()
    return " and ".join(ends)


def test_five_hundred_damaged_files_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, names = numpy_generator(0, "damage"), list(SHAPES)
    ends: Counter[str] = Counter()
    begin = time.perf_counter()
    for number in range(500):
        name, mutation = names[number % len(names)], MUTATIONS[number // len(names) % len(MUTATIONS)]
        shape = SHAPES[name]
        files = dict(shape.files)
        spoilt = list(files)[int(rng.integers(len(files)))]
        files[spoilt] = mutation(files[spoilt], rng)
        folder = tmp_path / str(number)
        folder.mkdir()
        changed = Shape(files=files, columns=shape.columns, flags=shape.flags)
        with bounded(10, f"{name}, {mutation.__name__}, file {number}"):
            ends[outcome(changed, folder)] += 1
    with capsys.disabled():
        print(f"\n  500 damaged files in {time.perf_counter() - begin:.1f} s: {dict(ends)}")
    assert ends.total() == 500
    assert ends["refused and refused"] >= 100
    assert ends["read and read"] >= 100
