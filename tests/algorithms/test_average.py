"""Rounds of averaging: nobody comes, somebody fails, all fail, and the best round is the one kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.algorithms.average import Average
from lichen.algorithms.scores import mean_loss, score
from lichen.core.contracts.algorithm import Report, ServerState
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.tree import Tree
from lichen.recipes.assemble.experiment import Experiment
from lichen.server.mean import Mean
from lichen.server.optimize import ServerAdam, ServerSGD
from lichen.server.sampling import Everyone, Poisson
from support.small_experiment import engine, experiment


def average(made: Experiment, **more: Any) -> Average:
    sizes = made.server.roster.rows_N("train")
    plain: dict[str, Any] = {
        "aggregator": Mean(),
        "optimizer": ServerSGD(),
        "sampler": Everyone(),
        "weight_N": sizes,
        "rounds": 4,
        "work": "train lr=0.1",
    }
    return Average(**{**plain, **more})


def same(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_sample_validates_and_its_bytes_stand_apart(tmp_path: Path) -> None:
    made = experiment()
    found = {}
    for name, some in (("everyone", None), ("all named", (0, 1, 2, 3)), ("two", (1, 3)), ("nobody", ())):
        there = engine(made, tmp_path / name)
        algorithm = average(made, validators=some, valid="valid" if some != () else None)
        found[name] = algorithm.round(algorithm.init(made.start), there, 7)
        assert found[name][1].bytes_up == there.bytes_up
    quiet = found["nobody"][1]
    assert (quiet.valid_up, quiet.valid_down) == (0, 0)
    for name, count in (("everyone", 4), ("all named", 4), ("two", 2)):
        state, report = found[name]
        assert same(state.shared.flat(), found["nobody"][0].shared.flat())
        assert report.bytes_up - report.valid_up == quiet.bytes_up
        assert report.bytes_down - report.valid_down == quiet.bytes_down
        assert report.valid_down * 4 == found["everyone"][1].valid_down * count
    assert found["everyone"][1].metrics == found["all named"][1].metrics
    there, best = engine(made, tmp_path / "again"), found["two"][0]
    job = Job(work="valid", shared=best.best, version=1, clients=(1, 3), seed=0)
    assert best.best_value == mean_loss(score(there, job)[1])


def test_a_round_nobody_comes_to_only_advances_the_round(tmp_path: Path) -> None:
    made = experiment()
    algorithm = average(made, sampler=Poisson(1e-12), optimizer=ServerAdam(), valid=None)
    start = algorithm.init(made.start)
    after, report = algorithm.round(start, engine(made, tmp_path), 7)
    assert after == replace(start, round=1)
    assert same(after.shared.flat(), made.start.flat())
    assert same(after.optimizer, start.optimizer)
    assert (report.clients, report.tokens, report.bytes_up, report.bytes_down) == ((), 0, 0, 0)
    assert report.metrics == {}  # a loss of 0 would be a lie


def test_empty_rounds_between_others_change_nothing_but_who_comes(tmp_path: Path) -> None:
    made = experiment()
    seen: list[Report] = []
    algorithm = average(made, sampler=Poisson(0.2), rounds=8)
    state = run(algorithm, engine(made, tmp_path), lambda: made.start, rounds=8, seed=3, observers=[seen.append])
    assert state.round == 8
    assert [r.round for r in seen] == list(range(1, 9))
    empty = [i for i, r in enumerate(seen) if not r.clients]
    assert 0 < len(empty) < 8
    for i in empty:
        assert "loss" not in seen[i].metrics
        if i:
            assert seen[i].metrics["valid"] == seen[i - 1].metrics["valid"]


def test_the_best_round_is_kept(tmp_path: Path) -> None:
    made = experiment()
    # From round 4 on the steps are so large that the network gets worse.
    algorithm = average(made, rounds=6, lr_scale=lambda r: 1.0 if r < 3 else 400.0)
    state, there = algorithm.init(made.start), engine(made, tmp_path)
    assert state.best_round == -1
    assert math.isnan(state.best_value)
    after: list[ServerState] = []
    values: list[float] = []
    for r in range(6):
        state, report = algorithm.round(state, there, 100 + r)
        after.append(state)
        values.append(report.metrics["valid"])
    best = values.index(min(values))
    assert 0 < best < 5
    assert (state.best_round, state.best_value) == (best + 1, values[best])
    assert same(state.best.flat(), after[best].shared.flat())
    assert not same(state.best.flat(), state.shared.flat())


@pytest.mark.parametrize(("every", "rounds", "judged"), [(2, 5, [2, 4, 5]), (3, 3, [3]), (9, 2, [2])])
def test_the_last_round_is_always_validated(tmp_path: Path, every: int, rounds: int, judged: list[int]) -> None:
    made = experiment()
    seen: list[Report] = []
    algorithm = average(made, valid_every=every, rounds=rounds)
    run(algorithm, engine(made, tmp_path), lambda: made.start, rounds=rounds, seed=0, observers=[seen.append])
    assert [r.round for r in seen if "valid" in r.metrics] == judged


def test_when_all_clients_fail_shared_stays(tmp_path: Path) -> None:
    made = experiment(broken=(0, 1, 2, 3))
    algorithm = average(made, optimizer=ServerAdam())
    start = algorithm.init(made.start)
    after, report = algorithm.round(start, engine(made, tmp_path), 7)
    assert same(after.shared.flat(), made.start.flat())
    assert same(after.optimizer, start.optimizer)
    assert after.round == 1
    assert report.metrics["failed"] == 4
    assert "loss" not in report.metrics
    assert math.isfinite(report.metrics["valid"])


def test_one_that_fails_is_as_one_that_did_not_come(tmp_path: Path) -> None:
    class Three:
        def invite(self, weight_N: torch.Tensor, seed: int) -> tuple[int, ...]:
            return (0, 2, 3)

    made = experiment(broken=(1,))
    with_it, told = average(made).round(average(made).init(made.start), engine(made, tmp_path / "a"), 7)
    without, _ = average(made, sampler=Three()).round(average(made).init(made.start), engine(made, tmp_path / "b"), 7)
    assert told.metrics["failed"] == 1
    assert same(with_it.shared.flat(), without.shared.flat())
    assert not same(with_it.shared.flat(), made.start.flat())


def test_every_client_with_a_row_counts_once_in_the_mean_loss() -> None:
    sums = {"loss_sum": torch.tensor([2.0, 0.0, 9.0]), "count": torch.tensor([1.0, 0.0, 3.0])}
    assert mean_loss(sums) == pytest.approx((2 + 3) / 2)
