"""Private and masked runs over a real federation have the bytes of simulations, and sites pay for their rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.federation.test_kills import Commands, commands, until
from tests.recipes.sites.test_private_sites import ROWS, private, save_digits, with_key

import lichen
from lichen.cli import main
from lichen.clients.evaluation.value_notes import read_notes
from lichen.core.errors import LichenError
from lichen.core.secret.budget import Budget, begun_with
from lichen.federation.policy.keys import change_policy
from lichen.federation.submitting import served
from lichen.recipes.artifacts.contributions import read_contributions
from lichen.recipes.schema.read import read_recipe, write_recipe

SITES = {"north": "a.jsonl", "east": "b.jsonl", "south": "c.jsonl"}
NAMES = {"client": "0" * 16, "row": "1" * 16, "masks": "2" * 16, "silent": "3" * 16}
"""How the runs are called at the sites."""


def masked(whole: dict[str, Any], *, rounds: int = 2, **more: Any) -> dict[str, Any]:
    """The same without noise, all clients in every round, under masks."""
    kept = {name: value for name, value in whole.items() if name != "privacy"}
    federation = {"rounds": rounds, "local_steps": 2, "batch_size": 4, "aggregate": "mean"}
    return {**kept, "federation": federation, "privacy": {"secure": True, **more}, "value": {"kind": "first"}}


def prepared(run: Path, name: str, whole: dict[str, Any]) -> Path:
    """A run that was begun, and has nothing but its recipe, its name and a key."""
    with_key(run)
    recipe = read_recipe({**whole, "engine": {"name": "spawned"}, "data": {**whole["data"], "name": "elsewhere"}})
    (run / "recipe.yaml").write_text(write_recipe(recipe))
    (run / "state" / "run.json").write_text(json.dumps({"run": name, "left_out": {}}))
    return run


def is_served(federation: Path) -> bool:
    try:
        served(federation)
    except LichenError:
        return False
    return True


def submit(made: Commands, federation: Path, run: Path, then: Callable[[], None] = lambda: None) -> dict[str, Any]:
    at_sites = ("--federation", str(federation), "--sites", ",".join(SITES), "--wait", "120")
    until(lambda: is_served(federation), made)
    made.start(run.name, "submit", "--resume", str(run), *at_sites, warm=True)
    then()
    until(lambda: made.running[run.name].poll() is not None, made, 240)
    assert made.running[run.name].returncode == 0, made.said()
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def test_two_private_runs_over_the_network(federation: Path, tmp_path: Path, warm_folder: Path) -> None:
    files, whole = save_digits(tmp_path / "sites"), private(tmp_path)
    wholes = {"client": whole, "row": {**whole, **ROWS}}
    runs = {unit: prepared(tmp_path / unit, NAMES[unit], one) for unit, one in wholes.items()}
    kits = {site: federation / "kits" / site for site in SITES}
    with commands(tmp_path, warm_folder) as made:
        made.start("serve", "serve", str(federation))
        for site, kit in kits.items():
            change_policy(kit / "policy.yaml", ["from_scratch=true", "labels=true", "least_clients=1"])
            with_key(kit / "runs" / NAMES["row"], inside=".")
            made.start(site, "join", str(kit), "--data", str(files[SITES[site]]), warm=True)
        summaries = {unit: submit(made, federation, run) for unit, run in runs.items()}
        for name, place in (*((site, f"kits/{site}") for site in SITES), ("serve", "")):
            assert main(["stop", str(federation / place)]) == 0
            assert made.running[name].wait(60) == 0, made.said()
    for unit, run in runs.items():
        local = lichen.run(wholes[unit], out=with_key(tmp_path / f"{unit}-local"), resume=True)
        finals = [(folder / "state" / "final.safetensors").read_bytes() for folder in (run, local.folder)]
        assert finals[0] == finals[1]
        assert summaries[unit]["privacy"]["statement"] == local.summary["privacy"]["statement"]
        assert summaries[unit]["columns"]["federated"] is None
    told = "".join((tmp_path / f"{site}.log").read_text() for site in SITES)
    assert "train lr=0.1 of round 1" in told
    assert {line.rpartition(", ")[2] for line in told.splitlines() if line.startswith("train ")} == {"6 in all sites"}
    for kit in kits.values():
        for path in (kit / "runs" / NAMES["row"] / "accounts").glob("*.jsonl"):
            terms = begun_with(path)
            assert terms is not None
            assert Budget(path, terms=terms, gaps=True).charges == ROWS["federation"]["rounds"]  # type: ignore[index]
    accounts = [path for kit in kits.values() for path in kit.glob(f"runs/{NAMES['row']}/accounts/*.jsonl")]
    assert len(accounts) == 6


def test_masked_runs_over_the_network(federation: Path, tmp_path: Path, warm_folder: Path) -> None:
    """The sum of a round has the bytes of one without masks, and a round goes on without a site that is killed."""
    files, whole = save_digits(tmp_path / "sites"), private(tmp_path)
    wholes = {"masks": masked(whole), "silent": masked(whole, rounds=3, stage_seconds=4.0)}
    runs = {name: prepared(tmp_path / name, NAMES[name], one) for name, one in wholes.items()}

    def kill_east() -> None:
        trace = runs["silent"] / "trace.jsonl"
        until(lambda: trace.exists() and trace.read_bytes().count(b"\n") >= 1, made)
        made.kill("east")

    with commands(tmp_path, warm_folder) as made:
        made.start("serve", "serve", str(federation))
        for site, file in SITES.items():
            kit = federation / "kits" / site
            change_policy(kit / "policy.yaml", ["from_scratch=true", "labels=true", "least_clients=3"])
            made.start(site, "join", str(kit), "--data", str(files[file]), warm=site != "east")
        summary = submit(made, federation, runs["masks"])
        without = submit(made, federation, runs["silent"], kill_east)
        for name, place in (("north", "kits/north"), ("south", "kits/south"), ("serve", "")):
            assert main(["stop", str(federation / place)]) == 0
            assert made.running[name].wait(60) == 0, made.said()
    local = lichen.run({**wholes["masks"], "privacy": None}, out=tmp_path / "local")
    finals = [(folder / "state" / "final.safetensors").read_bytes() for folder in (runs["masks"], local.folder)]
    assert finals[0] == finals[1]
    assert summary["masks"]["simulated"] == []
    assert not any("swaps" in line for line in summary["masks"]["not_promised"])
    told = {
        (at, client): x
        for at, one in read_contributions(local.folder).rounds.items()
        for client, x in one.value.items()
    }
    home = {
        (at, int(path.stem)): x
        for path in federation.glob(f"kits/*/runs/{NAMES['masks']}/own_values/*/*.csv")
        for at, x in read_notes(path).items()
    }
    assert len(home) == 2 * 6
    assert home == pytest.approx(told, rel=1e-12, abs=1e-12)
    assert not read_contributions(runs["masks"]).totals
    assert main(["pay", str(runs["masks"]), "--budget", "9", "--by", "rows", "--federation", str(federation)]) == 0
    mean = local.summary["columns"]["federated"]["mean"]
    assert summary["columns"]["federated"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert without["extra"]["federated.scores"].startswith("of 5 of 6 clients")
    assert without["attendance"]["skipped"] == 0
    last = json.loads((runs["silent"] / "trace.jsonl").read_text().splitlines()[-1])
    assert last["attendance"]["missing"] == [1]  # the client of the site that is gone
    assert last["metrics"]["clients"] == 5
