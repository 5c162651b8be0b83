"""Training alone until it gains no more: who stops when, what is kept, and a kill at any place changes no byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lichen.algorithms.alone import Alone, UntilBest
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.data.batches.shards import ArrayShard
from lichen.engines.around import AroundEngine
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.workload import unbudgeted
from lichen.recipes.schema.recipe import Recipe
from support.small_experiment import engine, experiment

EVERYONE = (0, 1, 2, 3)
BOUND = (14, 12, 10, 4)
WORK = "alone lr=0.1"


class Killed(BaseException):
    """What a kill is to the process itself."""


def algorithm(*, patience: int = 2, every: int = 1, warmup: int = 0, bound: tuple[int, ...] = BOUND) -> UntilBest:
    alone = Alone(clients=4, rounds=max(bound), work=WORK, valid="alone.valid", valid_every=every)
    return UntilBest(alone=alone, patience=patience, rounds_N=bound, warmup=warmup)


def go(made: Experiment, there: Engine, folder: Path, until: UntilBest) -> tuple[list[Report], ServerState]:
    seen: list[Report] = []
    state = run(
        until,
        there,
        lambda: made.start,
        rounds=until.alone.rounds,
        seed=1,
        checkpoint=folder / "server.safetensors",
        stop=lambda state: not until.training(state),
        observers=[seen.append],
    )
    return seen, state


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def killed(inner: Engine, work: str, count: int) -> Engine:
    left = [count]

    def on_job(job: Job) -> Job:
        left[0] -= job.work == work
        if job.work == work and left[0] == 0:
            raise Killed
        return job

    return AroundEngine(inner, on_job=on_job)


@pytest.mark.parametrize(("patience", "every", "warmup"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (1, 2, 4)])
def test_each_client_trains_until_its_patience_or_its_rounds_are_over(
    tmp_path: Path, patience: int, every: int, warmup: int
) -> None:
    made, until = experiment(), algorithm(patience=patience, every=every, warmup=warmup)
    told, state = go(made, engine(made, tmp_path / "clients"), tmp_path, until)
    assert until.training(state) == ()
    for client, most in enumerate(BOUND):
        last = max(report.round for report in told if client in report.clients)
        assert [r.round for r in told if client in r.clients] == list(range(1, last + 1))  # who has stopped stays away
        gained = int(state.optimizer["gained_N"][client])
        assert last == min(max(gained, warmup) + patience * every, most)
    assert min(max(r.round for r in told if c in r.clients) for c in EVERYONE) < len(told)  # they stop apart
    values = [report.metrics["valid"] for report in told if "valid" in report.metrics]
    assert values == sorted(values, reverse=True)
    assert all((r.bytes_up, r.bytes_down) == (0, 0) for r in told)


def test_what_is_kept_is_the_least_loss_and_no_more_than_a_budget_would_give(tmp_path: Path) -> None:
    made, until = experiment(), algorithm(patience=20, bound=(14,) * 4)
    _, state = go(made, engine(made, tmp_path / "free" / "clients"), tmp_path / "free", until)
    own = ClientStore(tmp_path / "free" / "clients").load(EVERYONE, 28)
    assert own is not None
    assert torch.equal(own["best_value"], state.optimizer["least_N"])
    assert torch.equal((own["best_version"] + 1) // 2, state.optimizer["gained_N"])
    there = engine(made, tmp_path / "alone")
    run(replace(until.alone, rounds=5), there, lambda: made.start, rounds=5, seed=1)
    budgeted = ClientStore(tmp_path / "alone").load(EVERYONE, 10)
    assert budgeted is not None
    assert bool((own["best_value"] <= budgeted["best_value"]).all())
    assert bool((own["best_value"] < budgeted["best_value"]).any())


@pytest.mark.parametrize(("work", "count"), [("alone.valid", 1), ("alone.valid", 5), (WORK, 5), (WORK, 7)])
def test_a_kill_changes_no_byte(tmp_path: Path, work: str, count: int) -> None:
    made, until = experiment(), algorithm(patience=1)
    told, _ = go(made, engine(made, tmp_path / "whole" / "clients"), tmp_path / "whole", until)
    assert len(told) >= 7
    with pytest.raises(Killed):
        go(made, killed(engine(made, tmp_path / "cut" / "clients"), work, count), tmp_path / "cut", until)
    again, _ = go(made, engine(made, tmp_path / "cut" / "clients"), tmp_path / "cut", until)
    assert len(again) == len(told) - count + 1
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_blocks_of_any_size_give_the_same_bytes(tmp_path: Path) -> None:
    made, until, found = experiment(), algorithm(), []
    for block in (1, 3, 4):
        go(made, engine(made, tmp_path / str(block) / "clients", block=block), tmp_path / str(block), until)
        found.append(files(tmp_path / str(block)))
    assert found[0] == found[1] == found[2]


def test_who_has_no_validation_rows_stops_with_the_newest(tmp_path: Path) -> None:
    made, until = experiment(), algorithm(patience=3, bound=(14,) * 4)
    rows = [shard for shard in made.clients.valid if isinstance(shard, ArrayShard)]
    rows[2] = rows[2].between(0, 0)
    less = replace(made, clients=replace(made.clients, valid=tuple(rows)))
    told, _ = go(less, engine(less, tmp_path / "clients"), tmp_path, until)
    assert max(report.round for report in told if 2 in report.clients) == 3
    own = ClientStore(tmp_path / "clients").load((2,), 28)
    assert own is not None
    for name, best in ((n.removeprefix("best/"), x) for n, x in own.items() if n.startswith("best/")):
        assert torch.equal(best, own[f"params/{name}"])


def changed(recipe: Recipe, **sections: dict[str, object]) -> Recipe:
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=keys) for name, keys in sections.items()}
    )


@pytest.mark.parametrize(
    ("federation", "passes"),
    [
        ({"local_steps": 1, "batch_size": 2}, lambda rows: 2 / rows),
        ({"local_steps": 3, "batch_size": 4}, lambda rows: 12 / rows),
        ({"local_steps": 2, "batch_size": 100}, lambda rows: 2.0),
        ({"local_steps": None, "local_epochs": 3}, lambda rows: 3.0),
    ],
)
@pytest.mark.parametrize("valid_every", [1, 5])
def test_the_bound_is_passes_over_a_clients_rows(
    federation: dict[str, object], passes: Callable[[int], float], valid_every: int
) -> None:
    made = experiment()
    recipe = changed(
        made.recipe, federation={"rounds": 1, **federation, "valid_every": valid_every}, compare={"alone_epochs": 7}
    )
    free = unbudgeted(made.with_server(recipe=recipe).server)
    assert 1 <= free.every <= valid_every
    for client, rows in enumerate(made.server.roster.rows("train")):
        whole = passes(rows) * free.rounds_N[client]
        assert 7 <= whole < 7 + passes(rows) * free.every + 1e-9
        assert free.rounds_N[client] % free.every == 0
        assert client in free.training(free.rounds_N[client] - 1)
        assert client not in free.training(free.rounds_N[client])
    longer = changed(recipe, federation={"rounds": 100})
    assert all(most >= 100 for most in unbudgeted(made.with_server(recipe=longer).server).rounds_N)
