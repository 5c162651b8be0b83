"""A stream that is distilled to a base of other shapes: what is learned, from whom, bytes after kills, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import lichen
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.recipes.artifacts.distil import answers as answering
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.artifacts.verify import verify
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.rebase.run import rebase
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.adapt import score_on
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import WORDS, save_model

FIRST, SECOND = MONTHS[:2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three months and four, twelve questions, and bases: ``wide`` of other shapes, and ``wordy`` of more words."""
    home = tmp_path_factory.mktemp("distilled")
    save_model(home / "model")
    save_model(home / "wordy", more=("more", "words"))
    config = LlamaForCausalLM.from_pretrained(home / "model").config
    config.hidden_size, config.intermediate_size, config.head_dim = 48, 64, 12
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(home / "wide")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(home / "wide")
    for count in (2, 3):
        save_dated(home / f"rows{count}.jsonl", MONTHS[:count])
    lines = [json.dumps({"prompt": " ".join((*WORDS, *WORDS)[i : i + 3])}) for i in range(0, 36, 3)]
    (home / "ask.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return home


def page(home: Path, base: str = "wide", rows: str = "rows2.jsonl", **more: Any) -> dict[str, Any]:
    move = {"period": SECOND, "model": str(home / base), "how": "distil", "prompts": str(home / "ask.jsonl")}
    sections = {"federation": {"rounds": 1}, **more, "stream": {"rebase": move, **more.get("stream", {})}}
    return stream(home / "model", home / rows, **sections)


@pytest.fixture(scope="module")
def whole(home: Path) -> lichen.Result:
    return lichen.run(page(home), out=home / "whole")


def found_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "periods.json").read_text(encoding="utf-8"))
    for one in (*found["periods"], found["distilled"]):
        one.pop("record_sha256")
    return found


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_tree(folder / "state" / "final.safetensors")[0]


def equal(one: Path, other: Path) -> bool:
    a, b = final(one), final(other)
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_a_period_begins_from_what_learned_the_answers_of_the_model_in_force(
    home: Path, whole: lichen.Result, tmp_path: Path
) -> None:
    folder, inside = whole.folder, whole.folder / "distilled"
    found = found_in(folder)["rebased"]
    assert (found["how"], found["begins"]) == ("distil", "distilled")
    own = read_recipe(folder / "periods" / SECOND / "recipe.yaml")
    assert (own.model.name, own.model.adapter.init_from) == (str(home / "wide"), str(inside / "adapter"))
    learned = read_recipe(inside / "recipe.yaml")
    assert (learned.data.name, learned.stream, learned.engine.name) == (str(inside / "answers.jsonl"), None, "local")
    plain = read_recipe(stream(home / "model", home / "rows2.jsonl", stream={"period": SECOND}))
    experiment = open_recipe(on_base(plain, str(home / "wide"))).experiment
    sums = score_on(experiment, experiment.clients.test, Shared.of_flat(final(inside)), tmp_path)
    assert found["beginning"] == pytest.approx(float((sums["loss_sum"] / sums["count"]).double().exp().mean()))
    rows = [json.loads(line) for line in (inside / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found["answers"] == len(rows) >= 10
    assert whole.summary["extra"]["stream.rebased"] == f"{SECOND}: wide, distil, from {len(rows)} answers"
    assert (inside / "answers.jsonl").stat().st_mode & 0o077 == 0


def test_it_learns_what_the_command_teaches_from_the_same_period(
    home: Path, whole: lichen.Result, tmp_path: Path
) -> None:
    old, ask = whole.folder / "periods" / FIRST, home / "ask.jsonl"
    rebase(old, str(home / "wide"), how="distil", rounds=1, prompts=ask, out=tmp_path / "new")
    answers = [folder / "answers.jsonl" for folder in (whole.folder / "distilled", tmp_path / "new")]
    assert answers[0].read_bytes() == answers[1].read_bytes()
    assert equal(whole.folder / "distilled", tmp_path / "new" / "1-distil")


def test_killed_anywhere_and_given_later_rows_it_has_the_same_bytes(
    home: Path, whole: lichen.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, generate, out = RunFolder.save, answering.generate_text, tmp_path / "cut"
    sections, data = page(home), tmp_path / "rows.jsonl"
    data.write_bytes((home / "rows2.jsonl").read_bytes())
    sections["data"]["name"] = str(data)
    for lives in (5, 11):  # questions that are answered before the end
        calls = iter(range(lives))

        def answer(*args: Any, left: Any = calls, **words: Any) -> str:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return generate(*args, **words)

        monkeypatch.setattr(answering, "generate_text", answer)
        with pytest.raises(KeyboardInterrupt):
            lichen.run(sections, out=out, resume=out.exists())
        monkeypatch.undo()
        assert not (out / "distilled" / "answers.jsonl").exists()
    died: list[str] = []
    for _ in range(4 + 1):  # each round of the distilled run, and that of the period
        fresh: list[Path] = []

        def save_and_die(folder: RunFolder, path: Path, state: Any, fresh: list[Path] = fresh) -> None:
            save(folder, path, state)
            if not fresh:
                fresh.append(path)
                raise KeyboardInterrupt

        monkeypatch.setattr(RunFolder, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            lichen.run(sections, out=out, resume=True)
        monkeypatch.undo()
        died.append(fresh[0].relative_to(out).parts[0])
    assert died == ["distilled"] * 4 + ["periods"]
    lichen.run(sections, out=out, resume=True)
    assert found_in(out) == found_in(whole.folder)
    for part in ("distilled", f"periods/{SECOND}"):
        assert equal(out / part, whole.folder / part)
    assert (out / "distilled/answers.jsonl").read_bytes() == (whole.folder / "distilled/answers.jsonl").read_bytes()
    before = bytes_in(out / "distilled")
    data.write_bytes((home / "rows3.jsonl").read_bytes())
    (tmp_path / "moved.jsonl").write_bytes((home / "ask.jsonl").read_bytes())
    lichen.run(read_recipe(sections, [f"stream.rebase.prompts={tmp_path / 'moved.jsonl'}"]), out=out, resume=True)
    assert bytes_in(out / "distilled") == before
    assert found_in(out)["rebased"] == found_in(whole.folder)["rebased"]
    assert [Path(one["base"]).name for one in found_in(out)["periods"]] == ["model", "wide", "wide"]


def test_its_folder_is_a_run_that_is_verified_exported_and_talked_to(home: Path, whole: lichen.Result) -> None:
    folder = whole.folder
    assert verify(folder / "distilled").files > 5
    assert verify(folder).files > verify(folder / "distilled").files
    assert lichen.report(folder / "distilled").runs[0].summary["clients"] == 1
    wide = LlamaForCausalLM.from_pretrained(lichen.export(folder, merge=True))
    assert wide.config.hidden_size == 48
    assert lichen.talk(folder / "distilled").answer("w1 w2")[1]
    with (folder / "distilled" / "answers.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")
    for place in (folder, folder / "distilled"):
        with pytest.raises(LichenError, match="is another file"):
            verify(place)


def test_where_nothing_is_in_force_the_bare_base_answers(home: Path, tmp_path: Path) -> None:
    wild = {"stream": {"react": "roll-back"}, "optimizer": {"lr": [50.0]}}
    done = lichen.run(page(home, **wild), out=tmp_path / "run")
    assert found_in(done.folder)["periods"][0]["rolled_back"]
    _, bare, _, tokenizer = open_models(done.folder / "periods" / FIRST)
    row = json.loads((done.folder / "distilled" / "answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
    ids = tokenizer(f"<s> {row['prompt']}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert row["completion"].split()[0] == tokenizer.decode([int(bare(ids).logits[0, -1].argmax())])


def test_a_model_without_words_is_asked_more_or_another_way_is_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "generate_text", lambda *_, **__: "")
    with pytest.raises(LichenError, match="answers 0 of 12 questions") as caught:
        lichen.run(page(home), out=tmp_path / "run")
    assert caught.value.where == f"period {SECOND}: stream.rebase.how: distil"
    anew = page(home)
    anew["stream"]["rebase"] = {"period": SECOND, "model": str(home / "wide"), "how": "restart"}
    lichen.run(anew, out=tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "periods.json").read_text())["rebased"]["begins"] == "start"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "other words": ({}, {"model": "wordy"}, "stream.rebase.model", "another vocabulary"),
    "no questions": ({}, {"prompts": None}, "stream.rebase.prompts", "a stream has no public rows"),
    "no such questions": ({}, {"prompts": "nowhere.jsonl"}, "stream.rebase.prompts", "no such file"),
    "too few": ({}, {"prompts": "few.jsonl"}, "stream.rebase.prompts", "1 questions are not enough"),
    "for nothing": ({}, {"how": "restart"}, "stream.rebase.prompts", "asks nothing"),
    "no answers": ({"data": {"form": "plain"}}, {}, "stream.rebase.how", "writes no answers"),
    "labels": ({"task": "classify"}, {}, "stream.rebase.how", "writes no answers"),
    "preferences": ({"task": "prefer", "prefer": {"kind": "spin"}}, {}, "task", "scores of several do not compare"),
    "anew in any case": ({"stream": {"react": "restart"}}, {}, "stream.rebase.how", "every period begins anew"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_trained(home: Path, tmp_path: Path, name: str) -> None:
    sections, move, where, what = BAD[name]
    (home / "few.jsonl").write_text('{"prompt": "w1 w2"}\n', encoding="utf-8")
    spoilt = page(home, **sections)
    if spoilt["task"] == "classify":
        spoilt["data"]["columns"] = {"client": "who", "text": "reply", "label": "mood", "time": "when"}
        spoilt["data"]["classes"] = ["calm", "glad"]
        del spoilt["data"]["form"]
    changed = {
        key: str(home / value) if key in ("model", "prompts") and value else value for key, value in move.items()
    }
    spoilt["stream"]["rebase"] |= changed
    with pytest.raises(LichenError, match=what) as caught:
        lichen.run(spoilt, out=tmp_path / "out")
    assert caught.value.where.startswith(where)
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
