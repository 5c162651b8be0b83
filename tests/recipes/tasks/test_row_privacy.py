"""Runs that hide rows: a plan promises what a summary says, no cut of the work shows, no message gives text away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.recipes.tasks.test_private_recipe import EndError, final, with_key

import lichen
from lichen.core.errors import LichenError
from lichen.present.trace import read_trace
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.audit.audit import audit
from lichen.transforms.privacy import Gaussian, Sampled, epsilon
from support.tiny_llama import recipe, save_model, save_rows
from support.toy_cohorts import job

KEYS = (
    "data.partition={by: iid, clients: 6}",
    "optimizer.lr=[0.1]",
    "federation={rounds: 4, local_steps: 2, batch_size: 16, aggregate: mean, weighting: rows, clients_per_round: 3}",
    "compare={baselines: [], metric: accuracy}",
    "privacy={unit: row, sigma: 1.5, clip: 0.5}",
)


def run(out: Path, *keys: str, **more: Any) -> dict[str, Any]:
    return lichen.run(lichen.read_recipe("digits", KEYS + keys), out=out, **more).summary


def test_no_cut_of_the_work_shows_and_another_key_has_other_noise(tmp_path: Path) -> None:
    key = bytes(range(32))
    run(with_key(tmp_path / "one", key), "engine.clients_per_block=1", resume=True)
    run(with_key(tmp_path / "all", key), "engine.clients_per_block=6", resume=True)
    run(with_key(tmp_path / "spawned", key), "engine={name: spawned, nodes: 2}", resume=True)
    run(with_key(tmp_path / "ranks", key), "engine={name: distributed, nodes: 2}", resume=True)
    summary = run(tmp_path / "other")
    said = summary["privacy"]
    assert summary["failures"] == []  # what is not told is no failure
    assert final(tmp_path / "one") == final(tmp_path / "all") != final(tmp_path / "other")
    assert final(tmp_path / "one") == final(tmp_path / "spawned") == final(tmp_path / "ranks")
    budgets = [(tmp_path / name / "state" / "budget.jsonl").read_bytes() for name in ("one", "spawned", "ranks")]
    assert len(set(budgets)) == 1
    assert (tmp_path / "other" / "state" / "privacy.key").stat().st_mode & 0o777 == 0o600
    assert said["unit"] == "row"
    assert said["charges"] == 4
    for event in read_trace(tmp_path / "other"):
        assert event.report.tokens is None
        assert event.report.metrics.keys().isdisjoint({"loss", "valid"})


def test_a_plan_promises_what_the_summary_says_for_the_client_with_fewest_rows(tmp_path: Path) -> None:
    keys = ("privacy={unit: row, epsilon: 3, clip: 0.5}",)
    made = lichen.read_recipe("digits", KEYS + keys)
    planned, said = lichen.plan(made, seconds=0.1).as_dict()["privacy"], run(tmp_path / "run", *keys)["privacy"]
    assert (planned["statement"], planned["sigma"]) == (said["statement"], said["sigma"])
    rows_N = open_recipe(made).experiment.server.roster.rows("train")
    assert said["rate"] == pytest.approx(16 / min(rows_N))
    event = Sampled(Gaussian(said["sigma"], steps=4 * 2), rate=said["rate"])
    assert said["epsilon"] == epsilon([event], said["delta"]) <= 3
    assert said["delta"] < 1 / max(rows_N)
    assert "one row" in said["statement"]


def test_a_seed_is_no_privacy_and_without_a_key_nobody_trains(tmp_path: Path) -> None:
    assert run(tmp_path / "seeded", "privacy.seed=3")["privacy"]["statement"] == "no privacy: seeded"
    experiment = open_recipe(lichen.read_recipe("digits", KEYS)).experiment
    work = client_tasks(experiment)["train lr=0.1"].work
    state = work.init(job(experiment.start, (0,)), (0,), None)
    with pytest.raises(LichenError, match="no key"):
        work.step(state, {"active_C": torch.tensor([True]), "ends_step_C": torch.tensor([True])})


def test_a_stopped_run_never_passes_epsilon(tmp_path: Path) -> None:
    keys = ("privacy={unit: row, epsilon: 3, clip: 0.5}",)

    def end(event: Any) -> None:
        if event.report.round == 2:
            raise EndError

    with pytest.raises(EndError):
        run(tmp_path / "run", *keys, observers=[end])
    said = run(tmp_path / "run", *keys, resume=True)
    assert said["privacy"]["charges"] == 4
    assert said["privacy"]["epsilon"] <= 3
    assert said["training"]["federated"]["rounds"] == 3
    with pytest.raises(LichenError, match=r"round \d of 4 would pass ε"):
        run(tmp_path / "few", "privacy={unit: row, epsilon: 0.5, sigma: 0.6, clip: 0.5}")
    with pytest.raises(LichenError, match="published whole"):
        run(tmp_path / "delta", "privacy.delta=0.5")


@pytest.mark.parametrize("rule", ["ffa", "fedit", "fedsvd"])
def test_rules_of_lora_hide_rows_and_their_messages_give_no_text_away(rule: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", "pair", clients=2)
    found = {}
    for name in ("open", "private"):
        federation = {"aggregate": rule, "weighting": "uniform", "rounds": 1, "local_steps": 1, "batch_size": 1}
        made = recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", federation={**federation, "history": True})
        adapter = {"target_modules": ["q_proj", "v_proj"], "rank": 40, "alpha": 80}
        made |= {"compare": {"baselines": []}, "optimizer": {"name": "sgd", "lr": 0.3}}
        made["model"] = {**made["model"], "adapter": adapter}
        if name == "private":
            made["privacy"] = {"unit": "row", "sigma": 0.5, "clip": 0.1, "delta": 1e-2}
        result = lichen.run(made, out=tmp_path / name)
        read = audit(result.folder, rows=20).messages
        found[name] = sum(one.right for one in read)
    assert found["open"] > 0
    assert found["private"] == 0
    assert bool(result.summary["privacy"]["warnings"]) == (rule == "fedit")
    assert "one row" in (result.folder / "adapter" / "README.md").read_text()
    (result.folder / "state" / "privacy.key").unlink()
    with pytest.raises(LichenError, match="nobody knows which rows"):
        audit(result.folder, rows=20)
    assert audit(result.folder, rows=20, messages=0).membership
    assert not (result.folder / "state" / "privacy.key").exists()
