"""How many rows a column trains on, and what share of them it ever sees: against the very rows that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lichen
from lichen.present.report import summary_table, training_text
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.plan.plan import plan
from lichen.recipes.plan.workload import invitations
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.coverage import coverage_of, planned
from support.small_experiment import experiment
from support.tiny_llama import recipe, save_model, save_rows


def changed(made: Experiment, **federation: Any) -> Experiment:
    fed = made.recipe.federation.model_copy(update=federation)
    return made.with_server(recipe=made.recipe.model_copy(update={"federation": fed}))


def drawn(made: Experiment, rounds: list[tuple[int, ...]], first: int = 0) -> tuple[int, int]:
    """Rows, and different rows, that the training source really gives."""
    source, rows, different = client_tasks(made)["train lr=0.1"].source, 0, set()
    for r, clients in enumerate(rounds):
        for client in clients:
            for batch in source.batches((client,), first + r):
                numbers = [i for i in batch["index_CB"].flatten().tolist() if i >= 0]
                rows += len(numbers)
                different |= {(client, i) for i in numbers}
    return rows, len(different)


@pytest.mark.parametrize(
    "federation",
    [
        {"local_steps": 1, "batch_size": 4},
        {"local_steps": 2, "batch_size": 4},
        {"local_steps": 3, "batch_size": 16},
        {"local_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 2},
        {"local_steps": None, "local_epochs": 2, "batch_size": 4},
    ],
)
def test_rows_and_their_share_are_those_that_are_drawn(federation: dict[str, Any]) -> None:
    made = changed(experiment(), **federation)
    rounds = [(0, 1), (1, 2), (1,)]
    told = coverage_of(made.server, rounds)
    assert told.rows_there == sum(shard.size for shard in made.clients.train)
    found = [drawn(made, rounds, first=100 * i) for i in range(40)]
    assert {rows for rows, _ in found} == {told.rows}
    mean = sum(different for _, different in found) / len(found) / told.rows_there
    assert told.share_seen == pytest.approx(mean, abs=0.02)
    assert told.passes == told.rows / told.rows_there


def test_a_default_run_says_how_little_it_sees_before_and_after(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl", "pair", rows=60, clients=3)
    more: dict[str, Any] = {"federation": {"rounds": 2, "local_steps": 2, "batch_size": 4, "clients_per_round": 2}}
    more["compare"] = {"baselines": ["alone", "pooled"]}
    known = read_recipe(recipe(tmp_path / "model", tmp_path / "rows.jsonl", "pair", **more))
    expected = plan(known, seconds=0.05)
    result = lichen.run(known, out=tmp_path / "run")
    training = result.summary["training"]
    assert set(training) == {"federated", "alone", "pooled"}
    for name, told in training.items():
        before = expected.as_dict()["seen"][name]
        assert {key: told[key] for key in before} == before
        assert told["rounds"] == told["of"] == 2
        assert (told["kept"] is None) == (name == "alone")
    assert training["federated"]["rows"] == 2 * 2 * 2 * 4
    assert training["federated"]["rows_there"] == 3 * 36
    assert training["federated"]["share_seen"] < training["federated"]["passes"] < 0.35
    shown = [str(cell) for column in summary_table(result.summary).columns for cell in column.cells]
    assert training_text(training["federated"]) in shown
    assert "32 rows: 0.3 passes over 108" in training_text(training["federated"])


def test_columns_are_planned_as_they_are_run() -> None:
    made = changed(experiment(), rounds=3, clients_per_round=2)
    told = planned(made, invitations(made), ("alone", "alone_best", "pooled", "base"))
    assert set(told) == {"federated", "alone", "alone_best", "pooled"}
    assert 20 <= told["alone_best"].passes < 21.5
    assert told["federated"].rows == 3 * 2 * 3 * 4
    assert told["alone"].rows == 2 * 4 * 3 * 4  # two of three rounds, everybody
    assert told["pooled"].rows == told["federated"].rows
