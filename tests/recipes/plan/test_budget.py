"""The budget that a plan counts is the one that a run spends: rounds, clients and validations of every column."""

from __future__ import annotations

from pathlib import Path

import pytest

import lichen
from lichen.present.trace import Event, read_trace
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import validators_of
from lichen.recipes.plan.workload import WorkItem, budget, evaluations, invitations
from lichen.recipes.rows.prepare import first_of

GRID = [
    "federation.rounds=5",
    "federation.clients_per_round=4",
    "federation.valid_every=2",
    "federation.local_steps=1",
    "optimizer.lr=[0.1,0.3]",
    "optimizer.grid_rounds=3",
    "compare.baselines=[alone,alone_best]",
    "compare.alone_epochs=3",
]


def counted(events: list[Event], judges: int) -> tuple[int, int]:
    """Clients trained, and clients that validated."""
    return sum(len(e.report.clients) for e in events), judges * sum("valid" in e.report.metrics for e in events)


def test_a_run_spends_what_its_plan_counts(tmp_path: Path) -> None:
    recipe = lichen.read_recipe("digits", GRID)
    experiment = open_recipe(recipe).experiment
    work_items = {
        name: {c.kind: c for c in column} for name, column in budget(experiment, invitations(experiment)).items()
    }
    events = read_trace(lichen.run(recipe, out=tmp_path / "run").folder)
    by_column = {name: [e for e in events if e.column == name] for name in ("federated", "alone", "alone_best")}
    everyone, judges = len(experiment.server.roster), len(validators_of(experiment.server))
    train, valid = counted(by_column["federated"], judges)
    assert work_items["federated"]["train"].clients == train == 4 * (3 + 3 + 2)
    tested: WorkItem = work_items["federated"]["score"]
    assert tested.clients == valid + len(set(first_of(experiment.clients.test)))  # a test set in common is scored once
    train, valid = counted(by_column["alone"], everyone)
    assert (work_items["alone"]["alone"].clients, work_items["alone"]["alone.keep"].clients) == (train, valid)
    assert 0 < train < everyone * (3 + 3 + 2)


def test_values_take_at_most_the_evaluations_that_the_plan_counts(tmp_path: Path) -> None:
    for kind, exact in (("exact", True), ("loo", True), ("first", True), ("gtg", False)):
        keys = ["federation.rounds=2", "optimizer.lr=0.1", "compare.baselines=[]", f"value.kind={kind}"]
        keys += ["federation.clients_per_round=5", "federation.local_steps=1"]
        recipe = lichen.read_recipe("digits", keys)
        experiment = open_recipe(recipe).experiment
        most = evaluations(recipe, invitations(experiment), [1, 1])
        values = [e.report.value for e in read_trace(lichen.run(recipe, out=tmp_path / kind).folder)]
        found = sum(value.evaluations for value in values if value is not None)
        assert found == most if exact else 0 < found <= most


def test_one_rate_is_scored_once_and_is_not_chosen_on_validation_rows() -> None:
    def scored(*changes: str) -> int:
        experiment = open_recipe(lichen.read_recipe("digits", [*GRID, *changes])).experiment
        items = {item.kind: item for item in budget(experiment, invitations(experiment))["alone"]}
        return items["alone.score"].clients // len(experiment.server.roster)

    assert scored("optimizer.lr=0.1", "optimizer.grid_rounds=null") == 1
    assert scored("federation.rounds=10") == 1 + 2 + 1, "each rate after its trial, the chosen one again at the end"
    assert scored("optimizer.grid_rounds=null") == 1 + 2, "no rate goes on after its trial"


@pytest.mark.parametrize("patience", [99, 1])
def test_what_has_no_budget_spends_at_most_what_its_plan_counts(tmp_path: Path, patience: int) -> None:
    recipe = lichen.read_recipe("digits", [*GRID, f"compare.alone_patience={patience}"])
    experiment = open_recipe(recipe).experiment
    items = {item.kind: item for item in budget(experiment, invitations(experiment))["alone_best"]}
    events = [e for e in read_trace(lichen.run(recipe, out=tmp_path / "run").folder) if e.column == "alone_best"]
    train = sum(len(e.report.clients) for e in events)
    valid = sum(len(e.report.clients) for e in events if "valid" in e.report.metrics)
    tokens = sum(e.report.tokens for e in events)
    told = items["alone"].clients, items["alone"].workload.rows, items["alone.keep"].clients
    if patience == 99:
        assert told == (train, tokens, valid)
    else:
        assert all(spent < most for spent, most in zip((train, tokens, valid), told, strict=True))
