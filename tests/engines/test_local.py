"""The engine of one process: what it counts, and that company changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lichen.core.collecting.collect import drain
from lichen.core.errors import LichenError
from lichen.core.message import Job, concatenate_messages, pack_job, pack_message, take_client
from lichen.core.store import ClientStore
from lichen.data.batches.shards import ArrayShard
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.sides.clients import ClientSide
from lichen.recipes.schema.read import read_recipe

RECIPE = {
    "task": "classify",
    "model": {"student": {"kind": "image-mlp"}},
    "data": {"name": "rows.jsonl"},
    "federation": {"aggregate": "mean", "local_steps": 3, "batch_size": 4},
    "optimizer": {"lr": [0.1]},
}


def experiment(clients: int = 5) -> Experiment:
    rng = np.random.default_rng(0)

    def shard(rows: int) -> ArrayShard:
        return ArrayShard(x=rng.normal(size=(rows, 6)).astype(np.float32), labels=rng.integers(0, 3, rows))

    model = ImageMLP(6, hidden=(8,), classes=3)
    parts = [tuple(shard(n + c) for c in range(clients)) for n in (9, 4, 4)]
    clients = ClientSide(train=parts[0], valid=parts[1], test=parts[2])
    return Experiment.of(read_recipe(RECIPE), model, clients)


def test_any_block_gives_the_same_bytes_and_the_same_count(tmp_path: Path) -> None:
    made = experiment()
    job = Job(work="train lr=0.1", shared=made.start, version=0, clients=(0, 1, 2, 3, 4), seed=3)
    told, counted = [], []
    for size in (1, 2, 5):
        engine = LocalEngine(client_tasks(made), ClientStore(tmp_path / str(size)), block_size=size)
        whole = concatenate_messages(list(drain(engine, job)))
        told.append({int(whole.client_C[i]): pack_message(take_client(whole, i)) for i in range(5)})
        counted.append((engine.bytes_up, engine.bytes_down))
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 5
    assert counted[0] == counted[1] == counted[2]
    assert counted[0][0] == sum(len(data) for data in told[0].values())
    assert counted[0][1] == 5 * len(pack_job(Job(**{f: getattr(job, f) for f in job.__slots__} | {"clients": (2,)})))


def test_a_job_for_nobody_costs_nothing(tmp_path: Path) -> None:
    engine = LocalEngine(client_tasks(experiment()), ClientStore(tmp_path))
    assert list(drain(engine, Job(work="valid", shared=experiment().start, version=0, clients=(), seed=0))) == []
    assert (engine.bytes_up, engine.bytes_down) == (0, 0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"work": "dance"}, "this node knows: alone lr=0.1, alone.chosen"),
        ({"base": "b" * 64}, "this node holds aaaaaaaaaaaa"),
        ({"clients": (7,)}, "client 7 has no data here"),
    ],
)
def test_what_it_refuses(tmp_path: Path, more: dict[str, object], words: str) -> None:
    made = experiment()
    engine = LocalEngine(client_tasks(made), ClientStore(tmp_path), base="a" * 64)
    job = {"work": "valid", "shared": made.start, "version": 0, "clients": (0,), "seed": 0, **more}
    with pytest.raises(LichenError, match=words):
        list(drain(engine, Job(**job)))  # type: ignore[arg-type]
