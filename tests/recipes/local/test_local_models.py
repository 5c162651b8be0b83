"""A run's folder, its merged model and its adapter are one model, whoever opens it; what is spoilt is told."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.recipes.local.open import form_of, open_model
from lichen.recipes.local.question import answer_question, sampled
from lichen.serving.contract import ApiError, Completion, Message, ServedModel
from support.served import at_address
from support.tiny_llama import recipe, save_model, save_rows

GREEDY = sampled(max_new_tokens=8, temperature=None, top_p=None, seed=None)
ASK = ("w1 w2", "w7 w30 w4")
QUICK: dict[str, Any] = {"federation": {"rounds": 2, "local_steps": 2}, "optimizer": {"lr": [0.3]}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, rows, a run on conversations with its merged model, and a run on plain pairs."""
    home = tmp_path_factory.mktemp("runs")
    save_model(home / "model")
    for shape in ("messages", "pair"):
        rows = save_rows(home / f"{shape}.jsonl", shape)
        lichen.run(recipe(home / "model", rows, shape, **QUICK), out=home / shape)
    lichen.export(home / "messages", merge=True)
    return home


def answers(path: Path, **more: Any) -> list[str]:
    model = open_model(path, **more)
    try:
        return [answer_question(model, text, GREEDY) for text in ASK]
    finally:
        model.close()


def test_a_run_its_merged_model_and_its_adapter_answer_alike(home: Path) -> None:
    run = home / "messages"
    forms = {form_of(path) for path in (run, run / "merged", run / "adapter")}
    assert forms == {"run", "folder", "adapter"}
    talker = lichen.talk(run, max_new_tokens=8, repetition_penalty=1.0)
    expected = [talker.answer(text)[1] for text in ASK]
    assert expected != [talker.answer(text)[0] for text in ASK], "the run has learned something"
    assert answers(run) == expected
    assert answers(run / "merged") == expected
    assert answers(run / "adapter") == expected
    shutil.copytree(run / "adapter", home / "alone")
    config = json.loads((home / "alone" / "adapter_config.json").read_text())
    (home / "alone" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/gone"}))
    with pytest.raises(LichenError, match="'org/gone' is not on this machine"):
        open_model(home / "alone")
    assert answers(home / "alone", base=str(home / "model")) == expected


def test_a_run_on_pairs_is_asked_in_its_own_form(home: Path) -> None:
    talker = lichen.talk(home / "pair", max_new_tokens=8, repetition_penalty=1.0)
    assert answers(home / "pair") == [talker.answer(text)[1] for text in ASK]
    model = open_model(home / "pair")
    two = Completion(messages=(Message(role="user", content="w1"),) * 2, max_tokens=2)
    with pytest.raises(ApiError, match="send one user message"):
        model.complete(two)
    model.close()


def test_what_writes_nothing_is_refused(home: Path, tmp_path: Path) -> None:
    rows = save_rows(tmp_path / "rows.jsonl", "label")
    lichen.run(recipe(home / "model", rows, "label", **QUICK), out=tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no model")
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(tmp_path / "run" / "recipe.yaml", begun)
    for path, words in (
        (tmp_path / "run", "writes nothing"),
        (tmp_path / "empty", "holds no model"),
        (tmp_path / "none", "is not there"),
        (tmp_path / "file.txt", "is no model"),
        (begun, "finished"),
    ):
        with pytest.raises(LichenError, match=words):
            open_model(path)
    with pytest.raises(LichenError, match="is for an adapter"):
        open_model(home / "messages", base=str(home / "model"))


def test_spoilt_folders_are_told_in_a_sentence_or_answer(home: Path, tmp_path: Path) -> None:
    """Seventy-five: a file of a whole model or an adapter is cut, overwritten, emptied, or gone."""
    rng, refused = random.Random(5), list[LichenError]()
    for n in range(75):
        source = home / "messages" / rng.choice(["merged", "adapter"])
        folder = tmp_path / f"spoilt-{n}"
        shutil.copytree(source, folder)
        file = rng.choice(sorted(path for path in folder.iterdir() if path.suffix != ".md"))
        data, at = file.read_bytes(), rng.randrange(max(1, min(file.stat().st_size, 3000)))
        if n % 5 == 0:
            file.unlink()
        else:
            mine = rng.choice([b"", data[:at], data[:at] + rng.randbytes(9) + data[at + 9 :], b"[]", b"{}", b"null"])
            file.write_bytes(mine)
        try:
            model: ServedModel = open_model(folder)
        except LichenError as error:
            refused.append(error)
            continue
        with at_address(model) as server:
            assert server.port
        try:
            answer_question(model, "w1", GREEDY)
        except LichenError as error:
            refused.append(error)
        finally:
            model.close()
    assert len(refused) > 30
    assert all(error.what and error.fix for error in refused)


def test_a_teacher_at_the_address_is_the_local_one(home: Path, tmp_path: Path) -> None:
    words = tuple(f"word{'abcdefghij'[i % 10]}{'klmno'[i // 10]}" for i in range(40))  # so that its texts are no junk
    save_model(tmp_path / "model", more=words)
    save_model(tmp_path / "teacher", more=words, seed=3)
    rows = save_rows(tmp_path / "rows.jsonl", "pair", clients=6, rows=12)
    whole = recipe(tmp_path / "model", rows, "pair", federation={"rounds": 1, "local_steps": 1})
    whole["data"] |= {"split_by": "row", "public": {"share": 0.4, "unlabelled": 10}}
    section = {"answer_format": "text", "max_new_tokens": 6, "plain": True}
    models, counts = {}, list[dict[str, float]]()
    model = open_model(tmp_path / "teacher")
    with at_address(model) as server:
        endpoint = {"url": server.url, "model": "teacher", "ask": "echo"}
        for name, teacher in (("local", {"name": str(tmp_path / "teacher")}), ("address", {"endpoint": endpoint})):
            one = {**whole, "teacher": {**section, **teacher}, "cache_dir": str(tmp_path / f"cache-{name}")}
            run = lichen.run(one, out=tmp_path / name)
            counts.append({key: n for key, n in run.summary["extra"].items() if key != "fm.calls"})
            models[name] = load_tree(run.folder / "state" / "final.safetensors")[0]
    model.close()
    assert counts[0] == counts[1]
    assert counts[0]["fm.tokens_out"] > 10
    assert models["local"].keys() == models["address"].keys()
    assert all(bool((x == models["address"][key]).all()) for key, x in models["local"].items())
