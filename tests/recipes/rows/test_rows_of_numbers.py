"""Own rows of numbers go to the students that read them, and are refused by key everywhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import save_model


def save_pictures(file: Path, shape: tuple[int, ...]) -> Path:
    rng = np.random.default_rng(0)
    rows = [{"who": "ab"[i % 2], "x": rng.random(shape).round(3).tolist(), "y": i // 2 % 2} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def recipe(file: Path, kind: str = "image-mlp", **more: Any) -> dict[str, Any]:
    return {
        "task": "classify",
        "model": {"student": {"kind": kind, "width": 4}},
        "data": {"name": str(file), "columns": {"client": "who", "numbers": "x", "label": "y"}, "valid": 0.2},
        "optimizer": {"name": "sgd", "lr": [0.1]},
        "federation": {"rounds": 1, "local_steps": 2, "aggregate": "mean"},
        "compare": {"baselines": ["alone"]},
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "shape"), [("image-cnn", (4, 4)), ("image-cnn", (3, 5, 5)), ("image-cnn", (16,)), ("image-mlp", (3, 1, 2))]
)
def test_students_of_pictures_learn_own_rows(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    result = lichen.run(recipe(save_pictures(tmp_path / "rows.jsonl", shape), kind), out=tmp_path / "run")
    mean = result.summary["columns"]["federated"]["mean"]
    assert math.isfinite(mean)
    assert result.summary["read"]["rows"] == 24
    group = json.loads((tmp_path / "run/roster.json").read_text())["members"][0]["group"]
    assert group == " ".join(map(str, (1, *shape) if len(shape) == 2 else shape))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5), (1, 1, 4, 4)])
def test_what_is_no_square_picture_is_refused_by_its_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="square pictures") as told:
        open_recipe(read_recipe(recipe(save_pictures(tmp_path / "rows.jsonl", shape), "image-cnn")))
    assert told.value.where == "model.student.kind"
    assert str(shape[-1]) in told.value.what


def test_numbers_are_refused_where_texts_are_read(tmp_path: Path) -> None:
    file, model = save_pictures(tmp_path / "rows.jsonl", (4,)), {"name": str(save_model(tmp_path / "model"))}
    for task in ("classify", "chat", "oneshot"):
        whole = recipe(file, model=model, task=task)
        for section in ("optimizer", "federation", "compare"):
            del whole[section]
        with pytest.raises(LichenError, match="the rows are numbers") as told:
            lichen.run(read_recipe(whole), out=tmp_path / task)
        assert told.value.where == "model"
        assert "image-mlp" in told.value.fix
    with pytest.raises(LichenError, match="text-cnn does not fit this data"):
        open_recipe(read_recipe(recipe(file, "text-cnn")))
