"""Runs under privacy: one key gives one result anywhere, a plan promises what the summary says, and little is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.core.errors import LichenError
from lichen.core.secret.budget import Budget, begun_with
from lichen.present.trace import read_trace
from support.tiny_llama import recipe, save_model, save_rows

KEYS = (
    "data.partition={by: iid, clients: 8}",
    "optimizer.lr=[0.1]",
    "federation={rounds: 4, local_steps: 2, batch_size: 4, aggregate: mean, weighting: uniform, "
    "clients_per_round: 3, sampling: poisson}",
    "compare={baselines: [], metric: accuracy}",
    "privacy={sigma: 4.0, delta: 1e-2, clip: 0.5}",
)
SEEDED = ("privacy.seed=3", "data.valid=0.0")


def run(out: Path, *keys: str, **more: Any) -> dict[str, Any]:
    return lichen.run(lichen.read_recipe("digits", KEYS + keys), out=out, **more).summary


def final(out: Path) -> bytes:
    return (out / "state" / "final.safetensors").read_bytes()


def with_key(out: Path, key: bytes) -> Path:
    """A folder that has nothing but a key."""
    (out / "state").mkdir(parents=True)
    (out / "state" / "privacy.key").write_bytes(key)
    (out / "state" / "privacy.key").chmod(0o600)
    return out


def test_one_key_gives_the_same_bytes_in_any_engine_and_another_key_others(tmp_path: Path) -> None:
    key = bytes(range(32))
    run(with_key(tmp_path / "local", key), resume=True)
    run(with_key(tmp_path / "spawned", key), "engine={name: spawned, nodes: 1}", resume=True)
    run(with_key(tmp_path / "ranks", key), "engine={name: distributed, nodes: 2}", resume=True)
    run(tmp_path / "other")
    assert final(tmp_path / "local") == final(tmp_path / "spawned") == final(tmp_path / "ranks")
    assert final(tmp_path / "local") != final(tmp_path / "other")
    budgets = [(tmp_path / name / "state" / "budget.jsonl").read_bytes() for name in ("local", "spawned", "ranks")]
    assert len(set(budgets)) == 1
    assert (tmp_path / "other" / "state" / "privacy.key").stat().st_mode & 0o777 == 0o600


def test_the_seed_of_the_recipe_says_neither_who_comes_nor_what_the_noise_is(tmp_path: Path) -> None:
    said = [run(tmp_path / str(place), *SEEDED)["privacy"] for place in range(2)]
    assert said[0]["statement"] == "no privacy: seeded"
    assert said[0]["epsilon"] is None
    assert final(tmp_path / "0") == final(tmp_path / "1")
    assert not (tmp_path / "0" / "state" / "privacy.key").exists()
    told = "".join((tmp_path / "0" / name).read_text() for name in ("trace.jsonl", "record.jsonl"))
    assert '"clients": []' in told
    assert '"asked":[]' in told
    assert "loss" not in told
    assert '"counted":[]' in told
    for event in read_trace(tmp_path / "0"):
        assert event.report.metrics.keys() == {"noise"}
        assert event.report.attendance.receipts == ()


def test_a_plan_promises_what_the_summary_says(tmp_path: Path) -> None:
    keys = ("privacy={epsilon: 1, clip: 0.5, delta: 1e-2}",)
    planned = lichen.plan(lichen.read_recipe("digits", KEYS + keys), seconds=0.1)
    privacy, said = planned.as_dict()["privacy"], run(tmp_path / "run", *keys)["privacy"]
    assert privacy["statement"] == said["statement"]
    assert privacy["sigma"] == said["sigma"]
    assert privacy["epsilon_by_round"][-1] == (4, said["epsilon"])
    assert said["epsilon"] <= 1 < said["epsilon"] + 1e-4
    rounds, spent = zip(*privacy["epsilon_by_round"], strict=True)
    assert list(rounds) == sorted(set(rounds))
    assert list(spent) == sorted(spent)
    shown = str(planned)
    for words in (said["statement"][:20], "ε after rounds", "beside the signal"):
        assert words in shown
    # d numbers with σ C / q N of noise each.
    assert privacy["noise"] == pytest.approx(said["sigma"] * 0.5 * privacy["numbers"] ** 0.5 / 3)
    assert said["charges"] == 4
    assert said["left_out"]
    assert said["simulated"]
    assert said["statement"] in str(lichen.report(tmp_path / "run"))


def test_a_plan_whose_clients_all_come_says_that_correlated_noise_would_not_help() -> None:
    everybody = ("federation.clients_per_round=null", "federation.sampling=uniform")

    def says(*keys: str) -> bool:
        return "DP-FTRL" in str(lichen.plan(lichen.read_recipe("digits", KEYS + keys), seconds=0.1))

    assert says(*everybody)
    assert not says()
    assert not says(*everybody, "federation.rounds=1")
    assert not says(*everybody, "privacy.unit=row", "privacy.delta=1e-3")


class EndError(Exception):
    """Stands for a kill."""


def test_a_stopped_run_pays_again_and_ends_before_it_passes_epsilon(tmp_path: Path) -> None:
    keys = ("privacy={epsilon: 1, clip: 0.5, delta: 1e-2}",)

    def end(event: Any) -> None:
        if event.report.round == 3:
            raise EndError

    with pytest.raises(EndError):
        run(tmp_path / "run", *keys, observers=[end])
    said = run(tmp_path / "run", *keys, resume=True)
    # The third round was closed and not saved: it was paid for twice, and the fourth could not be.
    assert said["privacy"]["charges"] == 4
    assert said["privacy"]["epsilon"] <= 1
    assert said["training"]["federated"]["rounds"] == 3
    path = tmp_path / "run" / "state" / "budget.jsonl"
    terms = begun_with(path)
    assert terms is not None
    assert not Budget(path, terms=terms, limit=4).pays_for(3)
    path.unlink()
    with pytest.raises(LichenError, match="does not say what it has cost"):
        run(tmp_path / "run", *keys, resume=True)


def test_more_rounds_than_epsilon_pays_for_are_refused_before_any(tmp_path: Path) -> None:
    keys = ("privacy={epsilon: 0.5, sigma: 1.5, clip: 0.5, delta: 1e-2}",)
    for do in (lambda: run(tmp_path / "run", *keys), lambda: lichen.plan(lichen.read_recipe("digits", KEYS + keys))):
        with pytest.raises(LichenError, match=r"round \d of 4 would pass ε"):
            do()
    assert not (tmp_path / "run" / "state" / "budget.jsonl").exists()
    with pytest.raises(LichenError, match="published whole"):
        run(tmp_path / "delta", "privacy.delta=0.5")


@pytest.mark.parametrize("rule", ["ffa", "fedit", "fedsvd", "rolora"])
def test_rules_of_lora_learn_with_noise(rule: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", "pair")
    federation = {"aggregate": rule, "weighting": "uniform", "rounds": 2, "local_steps": 1}
    made = recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", federation=federation)
    made |= {"privacy": {"sigma": 0.5, "clip": 0.1, "delta": 1e-2}, "compare": {"baselines": []}}
    made["wire"] = {"up": ["int8"]}
    result = lichen.run(made, out=tmp_path / "run")
    assert json.loads((result.folder / "summary.json").read_text())["privacy"]["charges"] == 2
    assert bool(result.summary["privacy"]["warnings"]) == (rule == "fedit")
    assert "differential privacy" in (result.folder / "adapter" / "README.md").read_text()
