"""A plan of a stream against the stream that follows: bytes, what looks for drift, and the scores of all models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen import cli
from lichen.clients.drift.distances import DistanceBins
from lichen.clients.drift.embedding_sums import EmbeddingSums
from lichen.core.message import size
from lichen.models.features import EncoderFeatures
from lichen.recipes.assemble.workload import workload_of
from lichen.recipes.plan.plan import plan
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.yaml import dump_yaml
from lichen.recipes.stages.plans import StagedPlan
from lichen.recipes.tasks.streams import scores
from support.dated_rows import MONTHS, save_dated, stream
from support.tiny_llama import save_model

NAMES = list(MONTHS[:3])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    save_model(folder / "model")
    save_dated(folder / "rows.jsonl", MONTHS[:3])
    return folder


def page(home: Path, **more: Any) -> dict[str, Any]:
    keep = {"detect": "mmd", "react": "roll-back", "keep": {"recent": 1e9}, "replay": 0.3}
    return stream(home / "model", home / "rows.jsonl", federation={"rounds": 1}, stream={**keep, **more})


def test_bytes_and_rows_are_those_of_the_stream(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(page(home))
    planned = plan(recipe, seconds=0.05)
    assert isinstance(planned, StagedPlan)
    sent, read, scored = list[int](), list[float](), list[float]()
    for work in (EmbeddingSums, DistanceBins):

        def final(self: Any, state: Any, inner: Any = work.final) -> Any:
            message, own = inner(self, state)
            sent.append(size(message) * len(message.client_C))
            return message, own

        monkeypatch.setattr(work, "final", final)
    call, score = EncoderFeatures.__call__, scores.score_on

    def count_read(self: Any, batch: Any) -> Any:
        read.append(workload_of({name: x for name, x in batch.items() if not name.startswith("second_")}).tokens)
        return call(self, batch)

    def count_scored(experiment: Any, shards: Any, *more: Any) -> Any:
        source = experiment.evaluating(shards)
        scored.append(sum(workload_of(batch).tokens for c in range(len(shards)) for batch in source.batches((c,), 0)))
        return score(experiment, shards, *more)

    monkeypatch.setattr(EncoderFeatures, "__call__", count_read)
    monkeypatch.setattr(scores, "score_on", count_scored)
    done = lichen.run(recipe, out=tmp_path / "run")
    whole = planned.as_dict()
    assert list(whole["periods"]) == NAMES
    assert (whole["bytes"]["up"], whole["bytes"]["down"]) == (done.summary["bytes_up"], done.summary["bytes_down"])
    assert whole["drift"]["up"] == sum(sent) > 0
    columns = [planned.stages[name].expected.columns for name in NAMES]
    assert sum(one["drift"].evaluate_tokens for one in columns) == sum(read) > 0
    assert sum(one["models"].evaluate_tokens for one in columns) == sum(scored) > 0
    assert [whole["periods"][name]["drift"]["clients"] for name in NAMES] == [0, 4, 4]
    flops = [one["drift"].evaluate_flops / one["drift"].evaluate_tokens for one in columns]
    assert flops[0] < flops[1] < flops[2]  # the first period is compared with nothing, each later one with more
    assert all(one["drift"].seconds > 0 for one in columns)


def test_the_command_says_what_looks_for_drift_and_what_is_not_counted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_yaml(page(home, by="2 years")), encoding="utf-8")
    assert cli.main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert "stream.replay" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text(dump_yaml(page(home)), encoding="utf-8")
    words = ["-s", "stream.detect=adwin", "--json"]
    assert cli.main(["plan", str(tmp_path / "recipe.yaml"), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["periods"]) == NAMES
    assert "drift" not in found
    assert any("watch their losses" in note for note in found["notes"])
