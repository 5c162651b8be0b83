"""A run's folder is whole by itself: it is used without its data, moved, and never goes on with something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lichen
from lichen import cli
from lichen.core.errors import LichenError
from lichen.core.store import load_tree
from lichen.recipes.artifacts import inputs
from lichen.recipes.assemble import open as opening
from support.tiny_llama import recipe, save_model, save_rows

ROUNDS = {"federation": {"rounds": 1, "local_steps": 1, "batch_size": 4}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("own") / "model")


def scratch(data: Path) -> dict[str, Any]:
    whole = recipe(data, data, "pair", **ROUNDS)
    size = {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2}
    whole["model"] = {"scratch": size, "adapter": {"kind": "full"}}
    whole["data"] |= {"form": "stream", "max_length": 16, "columns": {"client": "who", "text": "reply"}}
    return whole


def oneshot(model: Path, data: Path) -> dict[str, Any]:
    whole = recipe(model, data, "label", compare={"baselines": [], "partitions": 1})
    del whole["federation"], whole["optimizer"]
    whole["data"].pop("form", None)
    return {**whole, "task": "oneshot", "model": {"name": str(model)}}


@pytest.mark.parametrize("kind", ["chat", "classify", "oneshot", "scratch", "full"])
def test_it_is_used_when_data_and_cache_are_gone(model: Path, tmp_path: Path, kind: str) -> None:
    shape = "label" if kind in ("classify", "oneshot") else "pair"
    data = save_rows(tmp_path / "rows.jsonl", shape)  # type: ignore[arg-type]
    full = {"model": {"name": str(model), "adapter": {"kind": "full"}}} if kind == "full" else {}
    makes: dict[str, Callable[[], dict[str, Any]]] = {
        "oneshot": lambda: oneshot(model, data),
        "scratch": lambda: scratch(data),
    }
    whole = makes.get(kind, lambda: recipe(model, data, shape, **ROUNDS, **full))()  # type: ignore[arg-type]
    folder = lichen.run(whole, out=tmp_path / "runs" / "a").folder
    before = lichen.talk(folder).answer("w1 w2")
    merged = None if kind == "oneshot" else load_file(lichen.export(folder, merge=True) / "model.safetensors")
    data.unlink()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    moved = tmp_path / "elsewhere" / "b"
    moved.parent.mkdir()
    folder.rename(moved)
    assert lichen.talk(str(moved)).answer("w1 w2") == before
    if merged is None:
        return
    again = lichen.export(str(moved), merge=True, out=str(tmp_path / "again"))
    assert all(torch.equal(x, merged[name]) for name, x in load_file(again / "model.safetensors").items())
    if shape == "label":
        assert set(json.loads((again / "config.json").read_text())["label2id"]) == {"calm", "glad", "sad"}


def test_the_adapter_is_copied_where_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    folder = lichen.run(recipe(model, data, "pair", **ROUNDS), out=str(tmp_path / "run")).folder
    assert lichen.read_recipe(str(folder / "recipe.yaml")) == lichen.read_recipe(folder / "recipe.yaml")
    assert lichen.export(str(folder)) == lichen.export(folder) == folder / "adapter"
    copy = lichen.export(folder, out=str(tmp_path / "copy"))
    assert {f.name: f.read_bytes() for f in copy.iterdir()} == {
        f.name: f.read_bytes() for f in (folder / "adapter").iterdir()
    }
    with pytest.raises(LichenError, match="not empty"):
        lichen.export(folder, out=copy)
    with pytest.raises(LichenError, match="not a run"):
        lichen.export(tmp_path / "nothing")


def stopped(whole: dict[str, Any], out: Path) -> Path:
    """A run that was killed when its first round was on disk."""
    seen: list[int] = []

    class KillError(Exception):
        pass

    def observe(event: Any) -> None:
        seen.append(event.report.round)
        if event.report.round == 2:
            raise KillError

    with pytest.raises(KillError):
        lichen.run(whole, out=out, observers=[observe])
    assert seen == [1, 2]
    return out


def edited(file: Path, change: Callable[[list[Any]], list[Any]]) -> None:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), encoding="utf-8")


CHANGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "one more": lambda rows: [*rows, rows[0]],
    "one less": lambda rows: rows[:-1],
    "one word": lambda rows: [{**rows[0], "reply": "w1"}, *rows[1:]],
    "one owner": lambda rows: [{**rows[0], "who": "person-4"}, *rows[1:]],
    "order": lambda rows: rows[::-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_rows_are_refused(model: Path, tmp_path: Path, change: str) -> None:
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    good = data.read_text()
    whole = recipe(model, data, "pair", federation={"rounds": 3})
    folder = stopped(whole, tmp_path / "run")
    edited(data, CHANGES[change])
    with pytest.raises(LichenError, match="has changed since the run began: 50 rows then") as caught:
        lichen.run(whole, out=folder, resume=True)
    assert caught.value.where == str(data)
    assert "data.name=PATH" in caught.value.fix
    assert not (folder / "summary.json").exists()
    data.write_text(good)
    resumed = lichen.run(whole, out=folder, resume=True)
    fresh = lichen.run(whole, out=tmp_path / "fresh")
    one, other = (load_tree(result.folder / "state" / "final.safetensors")[0] for result in (resumed, fresh))
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_what_is_written_otherwise_is_the_same_rows(model: Path, tmp_path: Path) -> None:
    """Spaces, order of keys and another format are no change of the data; a moved file is named on the way."""
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    folder = stopped(recipe(model, data, "pair", federation={"rounds": 3}), tmp_path / "run")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(dict(reversed(row.items())), indent=None) + " \n" for row in rows))
    moved = tmp_path / "far" / "own.json"
    moved.parent.mkdir()
    moved.write_text(json.dumps(rows, indent=1))
    far = folder.rename(tmp_path / "far" / "run")
    data.unlink()
    assert cli.main(["run", "--quiet", "--resume", str(far)]) == 2
    assert cli.main(["run", "--quiet", "--resume", str(far), "-s", f"data.name={moved}"]) == 0
    assert lichen.read_recipe(far / "recipe.yaml").data.name == str(moved)
    assert cli.main(["run", "--quiet", "--resume", str(far)]) == 0


def test_a_place_with_other_rows_is_not_remembered(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    other = save_rows(tmp_path / "other.jsonl", "pair", rows=9)
    folder = stopped(recipe(model, data, "pair", federation={"rounds": 3}), tmp_path / "run")
    assert cli.main(["run", "--quiet", "--resume", str(folder), "-s", f"data.name={other}"]) == 2
    assert "45 now" in capsys.readouterr().err
    assert cli.main(["run", "--quiet", "--resume", str(folder), "-s", "optimizer.lr=[0.5]"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert cli.main(["run", "--quiet", "--resume", str(folder)]) == 0


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    whole = recipe(model, data, "pair", federation={"rounds": 3})
    folder = stopped(whole, tmp_path / "run")
    good = (model / "model.safetensors").read_bytes()
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LichenError, match="other weights") as caught:
        lichen.run(whole, out=folder, resume=True)
    assert caught.value.where == str(model)
    (model / "model.safetensors").write_bytes(good)
    words = json.loads((model / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    before = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(LichenError, match="other tokens"):
        lichen.run(whole, out=folder, resume=True)
    (model / "tokenizer.json").write_text(before)
    moved = model.rename(tmp_path / "moved")
    assert cli.main(["run", "--quiet", "--resume", str(folder), "-s", f"model.name={moved}"]) == 0


def test_another_start_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    first = lichen.run(recipe(model, data, "pair", **ROUNDS), out=tmp_path / "first").folder / "adapter"
    adapter = {"target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4, "init_from": str(first)}
    whole = recipe(model, data, "pair", federation={"rounds": 3}, model={"name": str(model), "adapter": adapter})
    folder = stopped(whole, tmp_path / "run")
    tensors = load_file(first / "adapter_model.safetensors")
    save_file({k: 2 * x for k, x in tensors.items()}, first / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LichenError, match="other weights") as caught:
        lichen.run(whole, out=folder, resume=True)
    assert str(first) in caught.value.where


def test_another_format_and_a_damaged_mark_are_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = save_rows(tmp_path / "rows.jsonl", "pair")
    whole = recipe(model, data, "pair", federation={"rounds": 3})
    folder = stopped(whole, tmp_path / "run")
    mark = folder / "state" / "inputs.json"
    monkeypatch.setattr(inputs, "FORMAT", inputs.FORMAT + 1)
    with pytest.raises(LichenError, match="another version of lichen"):
        lichen.run(whole, out=folder, resume=True)
    monkeypatch.undo()
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    good = mark.read_text()
    for text, match in (("{", "is damaged"), ("[]", "another version"), ("", "is damaged")):
        mark.write_text(text)
        with pytest.raises(LichenError, match=match):
            lichen.run(whole, out=folder, resume=True)
    mark.unlink()
    with pytest.raises(LichenError, match="is missing"):
        lichen.run(whole, out=folder, resume=True)
    (folder / "state" / "journal.jsonl").unlink()  # as of a version that had neither
    with pytest.raises(LichenError, match="another version"):
        lichen.run(whole, out=folder, resume=True)
    mark.write_text(good)
    lichen.run(whole, out=folder, resume=True)


@pytest.mark.parametrize("kind", ["exchange", "oneshot"])
def test_the_other_tasks_refuse_too(model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "exchange":
        whole: Any = lichen.read_recipe("digits-unequal", ["federation.rounds=1", "exchange.first_steps=1"])
        folder = lichen.run(whole, out=tmp_path / "run").folder
        mark = json.loads((folder / "state" / "inputs.json").read_text())
        assert mark["rows"] > 1000
        monkeypatch.setattr(opening, "records_digest", lambda _: "0" * 64)
    else:
        data = save_rows(tmp_path / "rows.jsonl", "label")
        whole = oneshot(model, data)
        folder = lichen.run(whole, out=tmp_path / "run").folder
        edited(data, lambda rows: rows[1:])
    with pytest.raises(LichenError, match="has changed since the run began"):
        lichen.run(whole, out=folder, resume=True)
