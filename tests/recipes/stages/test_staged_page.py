"""Bad input for every key of stages is one sentence with its stage; what a page says is what its stages run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.recipes.schema.read import different_keys, read_recipe, staged_gallery
from lichen.recipes.schema.yaml import dump_yaml, load_yaml
from lichen.recipes.stages.read import Staged, read_page, write_page
from support.staged import save_staged, staged_page

HOME = Path("nowhere")


def staged(page: dict[str, Any], *overrides: str) -> Staged:
    found = read_page(page, overrides)
    assert isinstance(found, Staged)
    return found


def with_stages(*stages: Any, **more: Any) -> dict[str, Any]:
    return staged_page(HOME, stages=list(stages), **more)


FULL = {"name": "whole", "model.adapter.kind": "full"}
CHAT = {"name": "chat", "federation.rounds": 3}
SCRATCH = {"name": "nothing", "model": {"name": None, "scratch": {"text": "sotu"}, "adapter": {"kind": "full"}}}
STUDENT = {
    "name": "small",
    "task": "classify",
    "model": {"name": None, "student": {"kind": "text-cnn"}},
    "data.columns": {"text": "reply", "label": "mood"},
}

BAD: dict[str, tuple[Any, str, str]] = {
    "no list": ({"chat": {}}, "stages", "must be a list"),
    "nothing": ([], "stages", "must be a list"),
    "none": (None, "stages", "must be a list"),
    "no mapping": (["chat"], "stages[0]", "must hold a name"),
    "no name": ([{"federation.rounds": 3}], "stages[0]", "has no name"),
    "a name that is none": ([{**CHAT, "name": "a/b"}], "stages[0].name", "cannot be a name"),
    "a number for a name": ([{**CHAT, "name": 3}], "stages[0].name", "cannot be a name"),
    "two of one name": ([CHAT, CHAT], "stages[1].name", "two stages are called 'chat'"),
    "no change": ([CHAT, {"name": "again"}], "stages.again", "changes nothing"),
    "no real change": ([CHAT, {"name": "again", "federation.rounds": 2}], "stages.again", "changes nothing"),
    "unknown key": ([{"name": "chat", "federation.round": 3}], "stages.chat: federation.round", "unknown"),
    "wrong type": ([{"name": "chat", "federation.rounds": "many"}], "stages.chat: federation.rounds", "must be"),
    "stages in a stage": ([FULL, {**CHAT, "stages": []}], "stages.chat", "of the whole recipe"),
    "a question of its own": ([FULL, {**CHAT, "question": "Why?"}], "stages.chat", "of the whole recipe"),
    "idle": ([{**FULL, "model.adapter.rank": 3}, CHAT], "stages.whole: model.adapter.rank", "has none"),
    "another model": ([FULL, {**CHAT, "model.name": "other"}], "stages.chat: model.name", "says otherwise"),
    "another start": (
        [FULL, {**CHAT, "model": {"adapter": {"init_from": "a"}}}],
        "stages.chat: model.adapter.init_from",
        "says otherwise",
    ),
    "from nothing again": ([FULL, {**SCRATCH}], "stages.nothing: model.scratch.text", "says otherwise"),
    "longer rows": ([SCRATCH, {**CHAT, "data.max_length": 64}], "stages.chat: data.max_length", "can look at"),
    "no template": ([SCRATCH, {"name": "chat", "data.form": "chat"}], "stages.chat: data.template", "template"),
    "after a student": ([STUDENT, CHAT], "stages.chat", "trains a student"),
    "a classifier first": (
        [{"name": "sort", "task": "classify", "data.columns": {"text": "reply", "label": "mood"}}, CHAT],
        "stages.chat: task",
        "tells classes",
    ),
    "a prompt, then lora": (
        [{"name": "words", "model.adapter.kind": "prompt"}, CHAT],
        "stages.chat: model.adapter",
        "no weights can take in",
    ),
    "few bits, then another": (
        [{"name": "bits", "model.quantize": "nf4"}, {**CHAT, "model.adapter.rank": 4}],
        "stages.chat: model.quantize",
        "cannot be merged",
    ),
    "a part stays": (
        [{"name": "part", "federation.aggregate": "fedsa"}, CHAT],
        "stages.chat",
        "leaves a part of each adapter",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_stage(name: str) -> None:
    stages, where, what = BAD[name]
    with pytest.raises(LichenError, match=what) as caught:
        read_page(staged_page(HOME, stages=stages))
    assert caught.value.where.startswith(where)
    assert caught.value.fix
    assert str(caught.value).count("\n") == 1


def test_what_a_stage_begins_with_follows_from_both_recipes() -> None:
    def begins(*stages: dict[str, Any]) -> list[str]:
        return [stage.begins for stage in staged(with_stages(*stages)).stages]

    again = {"name": "again", "optimizer.lr": 0.1}
    assert begins(CHAT, again) == ["anew", "start"]
    assert begins(CHAT, {**again, "model.adapter.rank": 4}) == ["anew", "base"]
    assert begins({**CHAT, "federation.aggregate": "flora"}, again) == ["anew", "base"]
    assert begins(FULL, again, {"name": "third", "data.form": "plain"}) == ["anew", "base", "start"]
    assert begins(CHAT, FULL) == ["anew", "base"]
    random = {**CHAT, "model.random": True}
    assert begins(random, again) == ["anew", "start"]
    assert begins(random, {**again, "seed": 5}) == ["anew", "base"]
    cut = staged(with_stages({**CHAT, "model.layers": 1}, again, {**FULL, "optimizer.lr": 0.1})).stages
    assert [stage.recipe.model.layers for stage in cut] == [1, 1, None]
    bits = {"model.quantize": "nf4"}
    assert begins({**CHAT, **bits}, {**again, **bits}) == ["anew", "start"]


def test_later_words_win_and_what_was_read_can_be_written() -> None:
    page = with_stages(FULL, CHAT, {"name": "again", "optimizer.lr": 0.1})
    words = ("federation.local_steps=7", "stages.chat.federation.rounds=9", "name=mine")
    found = staged(page, *words)
    assert [stage.recipe.federation.local_steps for stage in found.stages] == [7, 7, 7]
    assert [stage.recipe.federation.rounds for stage in found.stages] == [2, 9, 2]
    assert [stage.recipe.name for stage in found.stages] == ["mine-whole", "mine-chat", "mine-again"]
    assert found.stages[0].recipe.model.adapter.rank == 8  # all weights have none, and the default says nothing
    back = read_page(load_yaml(write_page(found), where="page"))
    assert isinstance(back, Staged)
    assert (back.name, back.question) == (found.name, found.question)
    for one, other in zip(found.stages, back.stages, strict=True):
        assert different_keys(one.recipe, other.recipe) == []
        assert (one.name, one.begins, one.folder) == (other.name, other.begins, other.folder)
    for word, what in {
        "stages.other.federation.rounds=1": "names no stage",
        "stages=3": "names no stage",
        "stages.chat=3": "names no key of that stage",
        "stages.chat.=3": "names no key of that stage",
        "stages.chat.name=other": "name is of the whole recipe",
        "stages.chat.question=Why?": "question is of the whole recipe",
        "stages.chat.stages=[]": "stages is of the whole recipe",
    }.items():
        with pytest.raises(LichenError, match=what) as caught:
            staged(page, word)
        assert caught.value.where == f"-s {word}"
        assert caught.value.fix
    with pytest.raises(LichenError, match="says otherwise"):
        staged(page, "stages.chat.model.name=other")


def test_paths_beside_the_page_are_found_for_every_stage(tmp_path: Path) -> None:
    (tmp_path / "later.jsonl").write_text("{}\n")
    page = with_stages(CHAT, {"name": "later", "data.name": "later.jsonl"})
    (tmp_path / "page.yaml").write_text(dump_yaml(page), encoding="utf-8")
    found = read_page(tmp_path / "page.yaml")
    assert isinstance(found, Staged)
    assert found.stages[1].recipe.data.name == str(tmp_path / "later.jsonl")


@pytest.mark.parametrize("name", sorted(staged_gallery()))
def test_stages_that_come_with_the_package_are_read(name: str) -> None:
    found = read_page(name)
    assert isinstance(found, Staged)
    assert found.name == name
    assert found.question.endswith("?")
    assert staged_gallery()[name].read_text(encoding="utf-8").startswith("# ")
    assert [stage.begins for stage in found.stages] == ["anew", "base", "base"]


def test_where_one_run_is_asked_for_stages_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = with_stages(FULL, CHAT)
    for ask in (lambda: read_recipe(page), lambda: lichen.run(page, sites={"a": "a.jsonl"}, out=tmp_path / "run")):
        with pytest.raises(LichenError, match="one") as caught:
            ask()
        assert caught.value.where == "stages"
        assert "after another" in caught.value.fix
    assert not (tmp_path / "run").exists()
    (tmp_path / "page.yaml").write_text(dump_yaml(page), encoding="utf-8")
    assert cli.main(["compare", str(tmp_path / "page.yaml"), "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("stages: ")


def refusal(page: dict[str, Any]) -> LichenError | None:
    try:
        read_page(page)
    except LichenError as error:
        return error
    return None


def test_two_hundred_spoilt_stages() -> None:
    """A key of a stage with another value is read, or refused by the stage's name in one sentence."""
    rng, refused = numpy_generator(0, "spoilt stages"), 0
    values: list[Any] = [True, "no such", -7.5, [[]], {"odd": {}}, [None], [], None, 0, 2**31, float("nan"), b"bytes"]
    keys = [
        *("task", "seed", "name", "model", "data", "optimizer", "federation.rounds", "federation", "federation.rond"),
        *("data.form", "data.max_length", "model.adapter", "model.adapter.kind", "model.name", "model.scratch"),
        *("compare.retention_text", "engine.name", "privacy", "teacher", "exchange", "personal", "stages", "", "a b"),
    ]
    for _ in range(200):
        page = copy.deepcopy(with_stages(FULL, CHAT, {"name": "again", "optimizer.lr": 0.1}))
        key, value = keys[int(rng.integers(len(keys)))], values[int(rng.integers(len(values)))]
        place = int(rng.integers(3))
        page["stages"][place][key] = value
        error = refusal(page)
        if error is not None:
            refused += 1
            assert error.where.startswith("stages"), (key, value, str(error))
            assert error.fix, (key, value, str(error))
            assert str(error).count("\n") == 1
            assert not any(word in str(error).lower() for word in ("pydantic", "valueerror", "tuple", "nonetype"))
    assert refused > 120


def test_a_plan_has_a_line_a_stage_and_the_sum(tmp_path: Path) -> None:
    save_staged(tmp_path)
    page = staged_page(tmp_path, compare={"baselines": []})
    workers = {"optimizer": {"warmup": 3}, "federation": {"keep_optimizer": True, "local_steps": 4}}
    page["stages"] = [{"name": "workers", "model.adapter.kind": "full", **workers}, page["stages"][1]]
    planned = lichen.plan(page, seconds=0.01)
    found = planned.as_dict()
    assert list(found["stages"]) == ["workers", "chat"]
    for way in ("up", "down"):
        assert found["bytes"][way] == sum(one["bytes"][way] for one in found["stages"].values())
    assert found["seconds"] == sum(one["seconds"] for one in found["stages"].values())
    lines = [line.split()[0] for line in str(planned).splitlines() if line.strip()]
    assert [line for line in lines if line in ("workers", "chat", "all")] == ["workers", "chat", "all"]
    assert found["disk"]["models"] > 0
    run = lichen.run(page, out=tmp_path / "run")
    sent = [one["bytes"]["up"] for one in found["stages"].values()]
    assert [one.summary["bytes_up"] for one in run.stages] == pytest.approx(sent, rel=0.02)  # messages name their base
