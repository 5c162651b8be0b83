"""What a site checks of jobs and messages of a recipe that it has accepted: all else is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from lichen.clients.statistics.declare import Declare
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, pack_message
from lichen.core.roster import Member, Roster
from lichen.core.wire.shared import Shared
from lichen.federation.policy.accepted import Accepted, accept_recipe, check_job, check_message
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.schema.yaml import dump_yaml
from support import small_experiment
from support.submitted import CHAT, CLASSES, EXCHANGE, changed, policy

DIGEST = "ab" * 32
RATES = changed(CHAT, {"optimizer.lr": [0.01, 0.1], "optimizer.grid_rounds": 2})
JOB = Job(work="train lr=0.01", shared=Shared({"w": torch.ones(4)}), version=3, clients=(2, 3), seed=1, base=DIGEST)


def accepted(values: dict[str, Any] = RATES, **lines: Any) -> Accepted:
    return accept_recipe(policy(**lines), dump_yaml(values))


def asked(job: Job, values: dict[str, Any] = RATES, lines: dict[str, Any] | None = None, **how: Any) -> None:
    """Check a job of a recipe that was accepted."""
    one = accepted(values)
    told = {"sha256": one.sha256, "mine": (2, 3, 4), "invited": 4, "trained": {2: 3, 3: 2}, **how}
    check_job(policy(**(lines or {})), one, job, **told)


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        replace(JOB, work="train lr=0.1", version=9),
        replace(JOB, work="valid", version=10),
        replace(JOB, work="test", version=10),
        replace(JOB, work="alone lr=0.1", version=40),
        replace(JOB, work="alone.chosen"),
        replace(JOB, work="roster", base=""),
    ],
    ids=lambda job: job.work,
)
def test_jobs_of_the_recipe_are_done(job: Job) -> None:
    asked(job)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (replace(JOB, work="leakage"), "asks for the work 'leakage'"),
        (replace(JOB, work="statistics"), "asks for the work 'statistics'"),
        (replace(JOB, work="predict/text-cnn"), "asks for the work"),
        (replace(JOB, work="train lr=0.5"), "asks for the work 'train lr=0.5'"),
        (replace(JOB, work="roster lr=0.1"), "asks for the work"),
        (replace(JOB, version=10), "is of step 10, and 10 rounds were accepted"),
        (replace(JOB, version=-1), "is of step -1"),
        (replace(JOB, work="valid", version=11), "is of step 11"),
        (replace(JOB, clients=(2, 9)), r"clients \[9\], which are not of this site"),
        (replace(JOB, clients=()), "is for nobody"),
        (replace(JOB, clients=(2, 2)), "is for nobody, or twice"),
        (replace(JOB, texts=("print rows",)), "brings texts"),
    ],
)
def test_a_job_outside_the_recipe_is_refused(job: Job, reason: str) -> None:
    with pytest.raises(LichenError, match=reason) as caught:
        asked(job)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"sha256": DIGEST}, "of another recipe"),
        ({"invited": 1}, "is for 1 clients in all sites"),
        ({"trained": {2: 100}}, "would be a client's round 101"),
        (
            {"lines": {"least_clients": 5}, "values": changed(RATES, {"federation.schedule.least": 5})},
            "4 clients in all",
        ),
        ({"lines": {"most_bytes_a_round": 10}}, "more than `most_bytes_a_round: 10`"),
        ({"lines": {"works": ["valid", "test", "alone"]}}, "asks for train"),
        ({"lines": {"models": []}}, "is not allowed"),
    ],
)
def test_a_job_that_the_site_does_not_do_any_more_is_refused(how: dict[str, Any], reason: str) -> None:
    with pytest.raises(LichenError, match=reason):
        asked(JOB, **how)


def test_a_model_by_its_digest_is_held_against_each_job() -> None:
    for line in (f"smollm2-135m@sha256:{DIGEST}", f"@sha256:{DIGEST}"):
        lines = {"models": [line]}
        one = accepted(**lines)
        how: dict[str, Any] = {"sha256": one.sha256, "mine": (2, 3), "invited": 2, "trained": {}}
        check_job(policy(**lines), one, JOB, **how)
        for base in ("", "cd" * 32):
            with pytest.raises(LichenError, match="is for weights"):
                check_job(policy(**lines), one, replace(JOB, base=base), **how)


def test_an_exchange_has_its_works() -> None:
    for work in ("predict/text-cnn", "learn/text-cnn", "train/text-cnn"):
        asked(replace(JOB, work=work, version=19), EXCHANGE)
        with pytest.raises(LichenError, match="is of step 20"):
            asked(replace(JOB, work=work, version=20), EXCHANGE)


def test_every_work_of_a_node_is_one_that_its_recipe_asks_for() -> None:
    made = small_experiment.experiment()
    values = changed(
        CLASSES, {"model": small_experiment.RECIPE["model"], "optimizer.lr": [0.1], "data.classes": ["0", "1", "2"]}
    )
    for work in client_tasks(made):
        asked(replace(JOB, work=work), values)


def message(**parts: Any) -> Message:
    base: dict[str, Any] = {
        "group": "adapter",
        "client_C": torch.tensor([2, 3]),
        "version_C": torch.zeros(2, dtype=torch.int64),
        "tensors": {"w": torch.zeros(2, 4)},
        "weight_C": torch.ones(2, dtype=torch.float64),
    }
    return Message(**{**base, **parts})


COUNT_C = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("lines", "parts", "reason"),
    [
        ({"metrics": False}, {"metrics": {"loss_sum": COUNT_C}}, "has the metrics loss_sum"),
        ({"sizes": False}, {"metrics": {"count": COUNT_C}}, "has the counts count"),
        ({"texts": False}, {"texts": (("a",), ("b",))}, "has texts"),
        ({"answers": False}, {"tensors": {"logits": torch.zeros(2, 5, 3)}}, "has the answers logits"),
        ({"labels": False}, {"group": "statistics/3x2/12"}, "has sums by class"),
        ({"labels": False}, {"tensors": {"logits": torch.zeros(2, 5, 3), "n": torch.zeros(2, 3)}}, "sums by class"),
        ({"most_bytes_a_round": 50}, {}, "bytes in this round"),
    ],
)
def test_what_may_not_go_up_stays(lines: dict[str, Any], parts: dict[str, Any], reason: str) -> None:
    assert check_message(policy(), message(**parts)) > 0
    with pytest.raises(LichenError, match=reason) as caught:
        check_message(policy(**lines), message(**parts))
    assert "stayed here" in caught.value.fix
    assert "nothing" not in caught.value.what


def test_labels_in_a_declaration_stay_and_names_and_rows_go() -> None:
    job = Job(work="roster", shared=Shared(), version=0, clients=(0,), seed=0)
    for labels in ({}, {"good": 3.0}):
        work = Declare(Roster((Member(name="ward-3", rows={"train": 3}, labels=labels, group="tokens"),)))
        declared, _ = work.final(work.init(job, (0,), None))
        assert check_message(policy(), declared)
        if labels:
            for rest in (declared.texts[0][1], "{", json.dumps(["good"])):
                with pytest.raises(LichenError, match="rows of each label"):
                    check_message(policy(labels=False), replace(declared, texts=(("ward-3", rest),)))
        else:
            assert check_message(policy(labels=False, texts=False), declared)


def test_bytes_of_a_round_are_added_up() -> None:
    one = message()
    count = check_message(policy(), one)
    single = [replace(one, client_C=x, version_C=x, weight_C=x.double(), tensors={"w": torch.zeros(1, 4)}) for x in
              (torch.tensor([2]), torch.tensor([3]))]  # fmt: skip
    assert count == sum(len(pack_message(x)) for x in single)
    limit = policy(most_bytes_a_round=2 * count)
    assert check_message(limit, one, sent=count) == count
    with pytest.raises(LichenError, match="in this round"):
        check_message(limit, one, sent=count + 1)
