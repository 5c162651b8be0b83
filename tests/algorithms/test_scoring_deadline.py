"""Scoring closes: who gives no score in time is missing, by cause, and in no mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_average import average

from lichen.algorithms.alone import Alone
from lichen.algorithms.scores import MISSING, missing_of, score, score_everyone
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.engines.federated import FederatedEngine, Patience
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.present.clients import client_rows
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.tasks.outcome import not_scored
from lichen.server.schedules import Synchronous
from support.missing import Those, WorkerSites
from support.small_experiment import engine, experiment

MADE = experiment(4)
JOB = Job(work="test", shared=MADE.start, version=0, clients=(0, 1, 2, 3), seed=0)
SOON = 0.6


NAMES = ("here", "here", "stuck", "away")
"""Whose site each client is at: client 2's takes jobs and ends none, client 3's is not there."""


@contextmanager
def over_sites(folder: Path) -> Iterator[FederatedEngine]:
    tasks = client_tasks(MADE)

    def worker(name: str) -> SiteWorker:
        return SiteWorker(lambda state: Talks(tasks, ClientStore(folder / name)))

    workers = {name: worker(name) for name in dict.fromkeys(NAMES)}
    patience = Patience(gone=0.05)
    with (
        WorkerSites(workers, stuck={"stuck"}, away={"away"}) as sites,
        FederatedEngine(sites, lambda client: NAMES[client], patience=patience) as made,
    ):
        yield made


def test_a_score_closes_and_says_over_whom_it_is(tmp_path: Path) -> None:
    whole = score_everyone(engine(MADE, tmp_path / "whole"), JOB)[1]
    with over_sites(tmp_path) as there:
        client_N, metrics = score_everyone(there, JOB, within=SOON)
        with pytest.raises(LichenError, match="nobody is there"):
            score_everyone(there, replace(JOB, clients=(0, 3)))
        with pytest.raises(LichenError, match="gave no score"):
            score_everyone(there, replace(JOB, clients=(2,)), within=SOON)
    assert client_N.tolist() == [0, 1, 2, 3]
    assert missing_of(metrics) == {"late": (2,), "gone": (3,)}
    assert missing_of(whole) == {}
    assert MISSING not in whole
    for name, x_N in whole.items():
        assert torch.equal(metrics[name][:2], x_N[:2])
        assert not bool(metrics[name][2:].any())
    recipe = MADE.server.recipe
    column = Column(value_N=values_N(recipe, metrics), metrics=metrics)
    assert column.value_N.isnan().tolist() == [False, False, True, True]
    assert torch.equal(column.value_N[:2], values_N(recipe, whole)[:2])
    told = not_scored({"federated": column, "alone": Column(value_N=values_N(recipe, whole), metrics=whole)}, 4)
    assert told == {"federated.scores": "of 2 of 4 clients; missing: late 1 (client 2), gone 1 (client 3)"}
    scores = {"federated": column.value_N.tolist()}
    rows = client_rows(list("abcd"), [], scores, higher_is_better=True, missing={"federated": missing_of(metrics)})
    assert [row["federated"] is None for row in rows] == [False, False, True, True]
    assert [row["why not"] for row in rows] == [None, None, "score of federated: late 1", "score of federated: gone 1"]


def test_a_round_and_its_validation_close_over_sites_as_in_a_simulation(tmp_path: Path) -> None:
    algorithm = average(MADE, schedule=Synchronous(deadline=SOON), scoring=SOON)
    start = algorithm.init(MADE.start)
    with over_sites(tmp_path) as there:
        state, report = algorithm.round(start, there, 7)
    assert report.attendance.causes == {
        "late": (2,),
        "gone": (3,),
        "validation: late": (2,),
        "validation: gone": (3,),
    }
    assert state.rollback == {2: 0, 3: 0}
    here = engine(MADE, tmp_path / "here")
    alike, _ = average(MADE, sampler=Those([(0, 1)]), validators=(0, 1)).round(start, here, 7)
    assert torch.equal(state.shared.trainable["layer0.weight"], alike.shared.trainable["layer0.weight"])
    assert state.best_value == alike.best_value == report.metrics["valid"]
    few = average(MADE, schedule=Synchronous(deadline=SOON, least=3), scoring=SOON, valid=None)
    with over_sites(tmp_path / "few") as there:
        state, report = few.round(start, there, 7)
    assert report.metrics["skipped"] == 1.0
    assert state.rollback == {0: 0, 1: 0, 2: 0, 3: 0}


def test_the_baseline_of_each_alone_closes_too(tmp_path: Path) -> None:
    alone = Alone(clients=4, rounds=1, work="alone lr=0.1", valid="alone.valid", deadline=SOON, scoring=SOON)
    with over_sites(tmp_path) as there:
        state, report = alone.round(alone.init(MADE.start), there, 7)
    here = engine(MADE, tmp_path / "here")
    two, told = replace(alone, clients=2).round(alone.init(MADE.start), here, 7)
    assert (state.best_value, report.metrics) == (two.best_value, told.metrics)
    with over_sites(tmp_path / "none") as there:
        late = Job(work="alone lr=0.1", shared=MADE.start, version=0, clients=(2,), seed=0)
        assert score(there, late, within=0.1)[1] == {}
        only = replace(alone, deadline=0.1, scoring=0.1)
        state, report, judged = only.one_round(alone.init(MADE.start), there, 7, (2,))
    assert (state.round, report.tokens, judged) == (1, 0, None)


def test_scoring_waits_as_long_as_its_key_says_else_as_a_round_does() -> None:
    def seconds(*words: str) -> float:
        return read_recipe("digits", ["engine.name=spawned", *words]).federation.schedule.scoring_seconds

    assert seconds() == math.inf
    assert seconds("federation.schedule.deadline=40") == 40
    assert seconds("federation.schedule.deadline=40", "federation.schedule.scoring_deadline=9") == 9
    with pytest.raises(LichenError, match="in one process all score when they are asked") as refused:
        read_recipe("digits", ["federation.schedule.scoring_deadline=9"])
    assert refused.value.where == "federation.schedule.scoring_deadline"
