"""Heads between everybody's rows and a client's own: what the weights 0 and infinity are, and who has all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lichen
from lichen.clients.personal.ridge import BestHead, PersonalHeads
from lichen.clients.statistics.sufficient import Statistics
from lichen.core.errors import LichenError
from lichen.core.fold import fold
from lichen.core.message import Job
from lichen.core.tree import Tree, split
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.recipes.schema.read import read_recipe
from lichen.server.ridge import Ridge, head_of
from support.site_threads import sites_in_threads
from support.sites import SITES, save_sites, sites_recipe

CLASSES, WIDTH, LAM = 3, 5, 0.7
STATISTICS = Statistics(lambda batch: batch["x_CBF"], classes=CLASSES, width=WIDTH)


def shards(clients: int, rows: int = 12) -> list[ArrayShard]:
    rng = np.random.default_rng(2)
    made = []
    for c in range(clients):
        labels = rng.integers(0, CLASSES, rows)
        flip = (labels + c) % CLASSES  # what a class looks like differs from client to client
        made.append(
            ArrayShard(
                (rng.normal(size=(rows, WIDTH)) + 2 * np.eye(CLASSES, WIDTH)[flip]).astype(np.float32), labels=labels
            )
        )
    return made


def sums_of(rows: list[ArrayShard]) -> Tree:
    job = Job(work="", shared=Shared(), version=0, clients=tuple(range(len(rows))), seed=0)
    message, _ = fold(STATISTICS, EvalSource(rows, batch_size=8, pad=0).batches(job.clients, 0), job, job.clients)
    return {name: x_C.sum(0) for name, x_C in message.tensors.items()}


def solved(rows: list[ArrayShard], shared: Tree, weights: tuple[float, ...]) -> Tree:
    work = PersonalHeads(STATISTICS, lam=LAM, weights=weights)
    job = Job(work="", shared=Shared({n: shared[n] for n in "GH"}), version=0, clients=tuple(range(len(rows))), seed=0)
    message, own_C = fold(work, EvalSource(rows, batch_size=8, pad=0).batches(job.clients, 0), job, job.clients)
    assert not message.tensors
    assert own_C is not None
    return own_C


def test_weight_0_is_the_shared_head_and_a_large_one_the_clients_alone() -> None:
    rows = shards(4)
    shared = sums_of(rows)
    own_C = solved(rows, shared, (0.0, 1e9))
    for name, x in head_of(shared, LAM).items():
        for c, shard in enumerate(rows):
            assert torch.equal(own_C[f"heads/0/{name}"][c], x)
            alone = head_of(sums_of([shard]), LAM * 1e-9)[name]
            assert torch.allclose(own_C[f"heads/1/{name}"][c], alone, atol=1e-5)


def test_who_owns_all_rows_has_the_pooled_head_of_a_smaller_lambda() -> None:
    rows = shards(1)
    shared = sums_of(rows)
    own_C = solved(rows, shared, (0.0, 3.0))
    for place, lam in ((0, LAM), (1, LAM / 4)):  # its rows count 1 + mu times, and lambda once
        pooled, _ = Ridge(lam).close(Ridge(lam).add(Ridge(lam).zero(), _message(rows)), Shared())
        for name, x in pooled.trainable.items():
            assert torch.allclose(own_C[f"heads/{place}/{name}"][0], x, atol=1e-9)


def _message(rows: list[ArrayShard]) -> Any:
    job = Job(work="", shared=Shared(), version=0, clients=(0,), seed=0)
    return fold(STATISTICS, EvalSource(rows, batch_size=8, pad=0).batches((0,), 0), job, (0,))[0]


def test_each_client_keeps_the_head_of_least_error_in_any_company() -> None:
    rows, valid, weights = shards(4), shards(4, rows=30), (0.0, 2.0, 50.0)
    own_C = solved(rows, sums_of(rows), weights)
    work = BestHead(lambda batch: batch["x_CBF"], classes=CLASSES, weights=weights)

    def best(clients: tuple[int, ...]) -> Tree:
        job = Job(work="", shared=Shared(), version=1, clients=clients, seed=0)
        mine_C = {name: x[list(clients)] for name, x in own_C.items()}
        kept = fold(work, EvalSource(valid, batch_size=8, pad=0).batches(clients, 0), job, clients, mine_C)[1]
        assert kept is not None
        return kept

    together = best((0, 1, 2, 3))
    assert len(set(together["mu"].tolist())) > 1
    for c, shard in enumerate(valid):
        assert all(torch.equal(x[0], together[name][c]) for name, x in best((c,)).items())
        truth = torch.eye(CLASSES, dtype=torch.float64)[torch.from_numpy(shard.labels)]
        errors = [
            float(
                (torch.from_numpy(shard.x).double() @ h["head.weight"][c].T + h["head.bias"][c] - truth).square().sum()
            )
            for h in (split(own_C, f"heads/{place}/")[0] for place in range(len(weights)))
        ]
        assert float(together["mu"][c]) == weights[int(np.argmin(errors))]


def oneshot(home: Path, **personal: Any) -> dict[str, Any]:
    made = sites_recipe(home, "label", compare={"baselines": ["alone"]})
    made = {key: made[key] for key in ("name", "data", "compare")}
    model = {"name": str(home / "model")}
    return {**made, "task": "oneshot", "model": model, "personal": {"kind": "ridge", **personal}}


def test_a_recipe_scores_them_the_same_over_sites_and_under_masks(tmp_path: Path) -> None:
    files = save_sites(tmp_path / "sites", "label")
    whole = oneshot(tmp_path, weight=[0, 4])
    local = lichen.run(whole, out=tmp_path / "local").summary
    assert local["extra_columns"]["personal"] is not None
    assert local["extra"]["personal.bytes_down"] > 0
    none = lichen.run(oneshot(tmp_path, weight=[0]), out=tmp_path / "none").summary
    assert none["extra_columns"]["personal"] == none["columns"]["federated"]
    masked = lichen.run({**whole, "privacy": {"secure": True}}, out=tmp_path / "masked").summary
    assert masked["extra_columns"]["personal"] == local["extra_columns"]["personal"]
    with sites_in_threads():
        apart = {**whole, "engine": {"name": "spawned"}, "data": {**whole["data"], "name": "/nowhere"}}
        there = lichen.run(apart, out=tmp_path / "apart", sites=dict(zip(SITES, files, strict=True))).summary
    assert there["extra_columns"]["personal"] == local["extra_columns"]["personal"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"name": "m", "head": "lda"}}, "model.head"),
        ({"personal": {"kind": "ditto"}}, "personal.kind"),
        ({"personal": {"kind": "ridge", "choose": True}}, "personal.choose"),
        ({"task": "classify"}, "personal.kind"),
    ],
)
def test_what_has_no_such_heads_is_refused(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    save_sites(tmp_path / "sites", "label")
    with pytest.raises(LichenError) as wrong:
        read_recipe({**oneshot(tmp_path), **changes})
    assert wrong.value.where == key
