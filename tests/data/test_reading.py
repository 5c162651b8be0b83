"""What was read: every count by hand, and cuts as the encoder makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lichen.data import reading
from lichen.data.batches.text import LmForm, encode_classify, encode_lm
from lichen.data.reading import Left, alike, lengths_of, reading_of
from lichen.data.sources.record import Record
from support.tiny_llama import save_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save_model(tmp_path_factory.mktemp("model")))


def words(count: int) -> str:
    return " ".join(f"w{i % 40}" for i in range(count))


def test_rows_clients_and_labels_are_counted() -> None:
    rows = [Record(client=f"c{i % 3}", text=str(i), label=["b", "a"][i % 4 == 0]) for i in range(10)]
    found = reading_of([*rows, Record(client="", text="nobody's")], left=[Left(why="no text", rows=2)])
    assert (found.rows, found.clients) == (11, 3)
    assert (found.least, found.middle, found.largest) == (3, 3, 4)
    assert list(found.labels.items()) == [("a", 3), ("b", 7)]
    assert found.left == (Left(why="no text", rows=2),)
    assert found.lengths is None
    assert json.loads(json.dumps(found.as_dict()))["left"] == [{"why": "no text", "rows": 2, "clients": 0}]


def test_reasons_are_added_up_and_empty_ones_left_out() -> None:
    left = [Left(why="small", rows=3, clients=1), Left(why="copies", rows=0), Left(why="small", rows=2, clients=1)]
    assert reading_of([], left=left).left == (Left(why="small", rows=5, clients=2),)


def test_names_that_differ_in_case_or_blanks_only_are_told() -> None:
    rows = [Record(client=c, text="x", label=y) for c in ("Ward A", "ward a", "b") for y in ("Yes", "yes ", "no")]
    assert reading_of(rows).alike == (
        "clients 'Ward A' and 'ward a' differ only in case or blanks",
        "classes 'Yes' and 'yes ' differ only in case or blanks",
    )
    assert alike("clients", ["a", "b"]) == ()
    many = alike("clients", [name for i in range(9) for name in (f"c{i}", f"C{i}")])
    assert len(many) == 6
    assert "4 more" in many[-1]


@pytest.mark.parametrize("form", ["plain", "transcript", "chat", "messages"])
def test_cuts_are_those_the_encoder_makes(tokenizer: Any, form: LmForm) -> None:
    rows = [(3, 4), (40, 4), (3, 40), (40, 40), (12, 12), (0, 20), (20, 14)]
    records = [
        Record(
            client="",
            prompt=words(ask),
            text=words(reply),
            messages=({"role": "user", "content": words(ask)}, {"role": "assistant", "content": words(reply)}),
        )
        for ask, reply in rows
    ]
    most = 32
    whole, cut = (encode_lm(records, tokenizer, form=form, max_length=n) for n in (10_000, most))
    learned = [tuple(int((labels != -100).sum()) for _, labels in pair) for pair in zip(whole, cut, strict=True)]
    before = [tuple(int((labels == -100).sum()) for _, labels in pair) for pair in zip(whole, cut, strict=True)]
    found = lengths_of(records, tokenizer, form=form, max_length=most)
    assert found is not None
    assert found.rows == len(rows)
    assert found.longest == max(len(ids) for ids, _ in whole)
    assert found.median == int(np.median([len(ids) for ids, _ in whole]))
    assert found.cut == sum(len(ids) > most for ids, _ in whole)
    assert found.cut_prompt == sum(a > b for a, b in before)
    assert found.cut_answer == sum(a > b for a, b in learned)
    assert found.cut_answer >= 1


def test_a_text_to_classify_loses_its_right(tokenizer: Any) -> None:
    records = [Record(client="", text=words(n), label="a") for n in (5, 20, 60)]
    found = lengths_of(records, tokenizer, form="classify", max_length=16)
    assert found is not None
    assert (found.cut, found.cut_prompt, found.cut_answer) == (2, 0, 2)
    assert found.longest == len(encode_classify(records, tokenizer, max_length=999, classes=("a",))[2][0])


def test_of_many_rows_some_are_looked_at(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reading, "MOST_ENCODED", 10)
    records = [Record(client="", text=words(1 + i // 50)) for i in range(100)]
    found = lengths_of(records, tokenizer, form="plain", max_length=16)
    assert found is not None
    assert found.rows == 10
    assert lengths_of([], tokenizer, form="plain", max_length=16) is None
