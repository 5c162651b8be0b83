"""What a plan says of masks, against the run that follows: bytes are equal, and every part of the cost is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lichen
from lichen.present.trace import read_trace
from lichen.recipes.assemble.sides.masks import mask_terms, without_masks
from lichen.recipes.plan.mask_pace import pace_of
from lichen.recipes.plan.plan import Plan, plan
from lichen.recipes.schema.read import read_recipe
from support.tiny_llama import recipe, save_model, save_rows

KEYS = (
    "data.partition={by: dirichlet, alpha: 1.0, clients: 6}",
    "optimizer.lr=[0.1]",
    "federation={rounds: 3, local_steps: 2, batch_size: 4, aggregate: mean, clients_per_round: 5}",
    "compare={baselines: [], metric: accuracy}",
)
MASKED = "privacy={secure: true, clip: 0.5}"
VALUED = "value={kind: first, every: 2}"
NOISED = (
    "federation={rounds: 2, local_steps: 2, batch_size: 4, aggregate: mean, weighting: uniform}",
    "data.valid=0.0",
    "privacy={secure: true, sigma: 0.5, delta: 1e-2, clip: 0.5, dropped: 0.2, seed: 3}",
)


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(read_recipe("digits", (*KEYS, MASKED, VALUED)), seconds=0.05)


def test_bytes_are_those_of_the_run_to_the_last(planned: Plan, tmp_path: Path) -> None:
    summary = lichen.run(read_recipe("digits", (*KEYS, MASKED, VALUED)), out=tmp_path / "run").summary
    sent, traffic = planned.expected.bytes, summary["traffic"]
    reports = [event.report for event in read_trace(tmp_path / "run")]
    assert (sent.up, sent.down) == (sum(r.bytes_up for r in reports), sum(r.bytes_down for r in reports))
    assert (sent.client_up, sent.client_down) == (traffic["client_up"], traffic["client_down"])
    assert (sent.valid_up, sent.valid_down) == (traffic["valid_up"], traffic["valid_down"])


def test_each_stage_is_told_and_what_is_promised(planned: Plan) -> None:
    masks = json.loads(json.dumps(planned.as_dict()))["masks"]
    terms = mask_terms(read_recipe("digits", (*KEYS, MASKED, VALUED)), 5)
    assert (masks["clients"], masks["neighbours"], masks["threshold"]) == (5, terms.k, terms.threshold)
    assert sum(stage["up"] for stage in masks["stages"]) == planned.expected.bytes.client_up
    assert all(stage["seconds"] > 0 and stage["up"] > 0 for stage in masks["stages"])
    assert masks["stages"][2]["up"] >= 8 * masks["numbers"] > 8 * planned.expected.trained
    assert masks["gone"] == 1
    assert masks["server_seconds"] > 0
    assert "the sum of a round and nothing else" in masks["statement"]
    clear = plan(without_masks(read_recipe("digits", (*KEYS, MASKED, VALUED))), seconds=0.05)
    assert clear.expected.masks is None
    assert masks["factor"] == planned.expected.bytes.up / clear.expected.bytes.up > 1
    shown = " ".join(str(planned).split())
    for words in ("4 opening", "until the sum is open", "times those without masks", masks["statement"]):
        assert words in shown


def test_bytes_under_noise_are_the_expected_ones_of_the_run(tmp_path: Path) -> None:
    wanted = read_recipe("digits", (*KEYS, *NOISED))
    sent, summary = plan(wanted, seconds=0.05).expected.bytes, lichen.run(wanted, out=tmp_path / "run").summary
    assert sent.up == pytest.approx(summary["bytes_up"], rel=0.02)
    assert sent.down == pytest.approx(summary["bytes_down"], rel=0.02)


def test_statistics_of_one_shot_too(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "label.jsonl", "label", rows=12)
    values = recipe(tmp_path / "model", tmp_path / "label.jsonl", "label", task="oneshot", compare={"baselines": []})
    values = {key: values[key] for key in ("name", "task", "data", "compare")}
    values |= {"model": {"name": str(tmp_path / "model")}, "privacy": {"secure": True}}
    wanted = read_recipe(values)
    found, summary = plan(wanted, seconds=0.05).expected, lichen.run(wanted, out=tmp_path / "run").summary
    assert (found.bytes.up, found.bytes.down) == (summary["bytes_up"], summary["bytes_down"])
    assert found.masks is not None
    assert found.masks["clients"] == summary["masks"]["clients"]


def test_more_numbers_and_more_silence_take_longer() -> None:
    few, many = pace_of(4, 3, 1000), pace_of(4, 3, 1 << 21)
    assert many.stages()[2] > few.stages()[2]
    assert many.server(60, 18) > many.server(60, 0)
