"""Schedules and clocks in recipes: what is refused, what a run leaves, and that a stopped one goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.present.trace import Event, read_trace
from lichen.recipes.schema.read import read_recipe

BUFFERED = (
    "federation.schedule.kind=buffered",
    "federation.schedule.arrivals=2",
    "engine.clock={median: 60, sigma: 1.5}",
)


@pytest.mark.parametrize(
    ("base", "words", "where", "what"),
    [
        ("digits", ("federation.schedule.kind=buffered",), None, "nobody is late"),
        ("digits", ("federation.schedule.deadline=10",), "federation.schedule.deadline", "nobody is late"),
        ("digits", ("federation.schedule.arrivals=3",), "federation.schedule.arrivals", "FedBuff's"),
        ("digits", (*BUFFERED, "federation.schedule.concurrency=1"), "federation.schedule.arrivals", "at work"),
        ("digits", (*BUFFERED, "federation.clients_per_round=4"), "federation.clients_per_round", "schedule.arrivals"),
        ("digits", (*BUFFERED, "federation.fair=minmax"), "federation.schedule.kind", "older tensors"),
        ("digits", (*BUFFERED, "engine.name=distributed"), "federation.schedule.kind", "no common clock"),
        ("digits", ("engine.clock={dropout: 0.1}",), "engine.clock.dropout", "never answers"),
        ("digits-unequal", ("engine.clock={median: 1}",), "engine.clock", "exchange"),
        ("chat-lora", (*BUFFERED, "federation.clients_per_round=null", "federation.aggregate=fedex"), None, "fedex"),
        ("chat-lora", (*BUFFERED, "federation.clients_per_round=null", "federation.aggregate=fedsa"), None, "fedsa"),
        (
            "chat-lora",
            (*BUFFERED, "federation.clients_per_round=null", "federation.keep_optimizer=true"),
            None,
            "older",
        ),
        ("chat-lora", ("compare.target_metric=accuracy",), "compare.target_metric", "no classes"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_recipe_is_read(
    base: str, words: tuple[str, ...], where: str | None, what: str
) -> None:
    with pytest.raises(LichenError, match=what) as caught:
        read_recipe(base, words)
    assert caught.value.where == (where or "federation.schedule.kind")
    assert caught.value.fix


def recipe(**federation: Any) -> Any:
    words = [
        *BUFFERED,
        "compare.baselines=[]",
        "optimizer.lr=0.3",
        "compare.target=0.3",
        "compare.target_metric=accuracy",
    ]
    words += ["federation.rounds=12", "federation.valid_every=1", "federation.local_steps=4"]
    return read_recipe("digits", [*words, *(f"federation.{key}={value}" for key, value in federation.items())])


def test_a_stopped_buffered_run_goes_on_to_the_same_bytes_and_tells_when_it_was_there(tmp_path: Path) -> None:
    whole = lichen.run(recipe(), out=tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop(event: Event) -> None:
        if event.report.round == 5:
            raise StopError

    with pytest.raises(StopError):
        lichen.run(recipe(), out=tmp_path / "part", observers=[stop])
    (checkpoint,) = (tmp_path / "part" / "state").rglob("server.safetensors")
    assert load_state(checkpoint).in_flight
    part = lichen.run(recipe(), out=tmp_path / "part", resume=True)
    (other,) = (tmp_path / "whole" / "state").rglob("server.safetensors")
    assert checkpoint.read_bytes() == other.read_bytes()
    reports = [[event.report for event in read_trace(run.folder)] for run in (whole, part)]
    assert [r.metrics for r in reports[0]] == [r.metrics for r in reports[1]]
    assert [(r.bytes_up, r.bytes_down) for r in reports[0]] == [(r.bytes_up, r.bytes_down) for r in reports[1]]
    assert any(r.metrics.get("age", 0) > 0 for r in reports[0])
    reached = next(r for r in reports[0] if r.metrics["valid_accuracy"] >= 0.3)
    extra = whole.summary["extra"]
    assert (extra["target.rounds"], extra["target.seconds"]) == (reached.round, reached.metrics["time"])


def test_a_comparison_tells_what_the_target_took(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text(
        json.dumps(
            {
                "base": "digits",
                "seeds": [0],
                "set": {
                    "optimizer.lr": 0.1,
                    "federation": {"rounds": 3, "local_steps": 2, "valid_every": 1},
                    "compare": {"baselines": [], "target": 0.1, "target_metric": "accuracy"},
                    "engine.clock": {"median": 60},
                },
                "methods": {"low": {}, "high": {"compare.target": 1.0}},
            }
        )
    )
    found = lichen.compare(page, out=tmp_path / "out")
    low, high = found.rows
    assert (low.target, low.reached, high.reached) == (0.1, 1, 0)
    assert low.target_seconds is not None
    assert low.target_seconds.mean > 0
    assert "never" in str(found)
    assert "until validation first reached 0.1, 1" in str(found)
    assert "target_seconds_mean" in (tmp_path / "out" / "compare.csv").read_text()
    shutil.rmtree(tmp_path / "out")
