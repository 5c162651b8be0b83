"""A plan of task prefer against the run that follows: the reference's pass, own answers, and the files of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lichen
from lichen.recipes.assemble.preference import own_answers, references
from lichen.recipes.assemble.workload import workload_of
from lichen.recipes.plan.plan import plan
from lichen.recipes.schema.read import read_recipe
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import save_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    save_model(folder / "model")
    rows = [json.loads(line) for line in save_dated(folder / "rows.jsonl", MONTHS[:2]).read_text().splitlines()]
    # Another answer to each, as long as its own.
    pairs = [json.dumps({**row, "worse": " ".join(row["reply"].split()[::-1])}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["dpo", "orpo", "spin"])
def test_each_row_is_scored_once_and_answered_token_by_token(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    sections = stream(home / "model", home / "rows.jsonl")
    del sections["stream"]
    writes = kind == "spin"
    columns = {"client": "who", "prompt": "ask"} | (
        {"completion": "reply"} if writes else {"chosen": "reply", "rejected": "worse"}
    )
    sections |= {"task": "prefer", "prefer": {"kind": kind, **({"temperature": 0.0} if writes else {})}}
    sections["data"]["columns"] = columns
    sections["federation"] |= {"rounds": 1, "clients_per_round": 2, "valid_clients": 3}
    recipe = read_recipe(sections)
    expected = plan(recipe, seconds=0.05).expected
    scored, written = list[int](), list[int]()
    score = references.row_logprobs

    def count_scored(model: Any, params: Any, fixed: Any, batch: Any, **words: Any) -> Any:
        scored.append(workload_of(batch).tokens)
        return score(model, params, fixed, batch, **words)

    def count_written(experiment: Any, rows: Any) -> np.ndarray:
        written.append(sum(len(row) + 1 for row in rows))
        return np.eye(1, 50, 9).repeat(len(rows), 0)  # a word that ends no answer: each is as long as a person's

    monkeypatch.setattr(references, "row_logprobs", count_scored)
    monkeypatch.setattr(own_answers, "_next_logits", count_written)
    folder = lichen.run(recipe, out=tmp_path / "run").folder
    assert expected.columns["reference"].evaluate_tokens == sum(scored) > 0
    assert expected.columns["reference"].seconds > 0
    assert ("own answers" in expected.columns) == writes
    if writes:
        assert expected.columns["own answers"].evaluate_tokens == sum(written) > sum(scored) / 2
        assert any("as long as a person's" in note for note in expected.notes)
    files = [file for part in ("reference", "own_answers") for file in (folder / "state" / part).rglob("*.safetensors")]
    assert expected.disk.private == sum(file.stat().st_size for file in files) > 0
