"""What a model writes is planned: as many texts and tokens as the run asks for at most, an endpoint untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.recipes.plan.plan import plan
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import WORDS, recipe, save_model, save_rows

WRITER = (
    "synthetic={name: MODEL, per_class: 4, max_new_tokens: 12, item_name: w1, temperature: 1.0, top_p: 1.0, "
    "filters: [duplicates]}"
)
PUBLIC = "data.public={share: 0.4, unlabelled: 20}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_model(folder / "model", more=tuple(f"{word}." for word in WORDS))
    for shape in ("pair", "label"):
        save_rows(folder / f"{shape}.jsonl", shape, clients=6, rows=16)
    return folder


def values(home: Path, shape: Any, *words: str) -> Any:
    whole = recipe(home / "model", home / f"{shape}.jsonl", shape)
    whole["data"] |= {"split_by": "row"}
    whole["cache_dir"] = str(home / "kept")
    return read_recipe(whole, [word.replace("MODEL", str(home / "model")) for word in words])


def test_texts_of_a_writer_are_those_the_run_writes(home: Path, tmp_path: Path) -> None:
    wanted = values(home, "label", WRITER, "synthetic.kind=evolution", "synthetic.embedder=MODEL")
    told = plan(wanted, seconds=0.05)
    texts = 3 * 4 * (1 + 4)
    assert f"writing: {texts} texts of at most 12 tokens, {12 * texts} tokens in all" in told.expected.notes
    assert told.expected.columns["writing"].evaluate_tokens == 12 * texts
    assert 0 < told.expected.columns["writing"].seconds <= told.seconds
    assert not (home / "kept").exists(), "what is tried for a plan is no answer of a run"
    extra = lichen.run(wanted, out=tmp_path / "run").summary["extra"]
    assert extra["synthetic.written"] == 3 * 4
    assert extra["fm.asked"] >= texts


def test_a_teacher_that_writes_and_what_is_not_counted(home: Path) -> None:
    told = plan(
        values(home, "pair", PUBLIC, "teacher={name: MODEL, answer_format: text, max_new_tokens: 6, at: both}"),
        seconds=0.05,
    )
    assert "writing: 20 texts of at most 6 tokens, 120 tokens in all" in told.expected.notes
    assert "teacher.at: the server's own 300 steps are not counted" in told.expected.notes
    assert told.expected.columns["writing"].seconds > 0


def test_an_endpoint_is_not_asked(home: Path) -> None:
    endpoint = "synthetic.endpoint={url: 'http://127.0.0.1:9/v1', model: x}"
    writer = WRITER.replace("name: MODEL, ", "")
    told = plan(values(home, "label", writer, endpoint, "semi.kind=fixmatch", "data.labels=5"), seconds=0.05)
    assert "writing: an endpoint is not timed, and its price is not known" in told.expected.notes
    assert "writing" not in told.expected.columns
    assert any(note.startswith("semi: ") for note in told.expected.notes)


def test_a_zero_shot_teacher_can_be_planned(home: Path) -> None:
    teacher = "teacher={name: MODEL, kind: zero-shot, template: 'w9 {text} w8'}"
    told = plan(values(home, "label", PUBLIC, "data.public.labelled=9", teacher), seconds=0.05)
    assert "teacher: a language model that is asked in words takes at least as long" in told.expected.notes
    assert told.expected.columns["teacher"].seconds > 0
