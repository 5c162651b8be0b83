"""SemiFL: the server's turn and the clients', counted bytes, resumption, and digits with labels at the server only."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.algorithms.average import Average
from lichen.algorithms.semi import SemiFL
from lichen.clients.evaluation.evaluate import Evaluate
from lichen.clients.training.fix_and_mix import FixAndMix
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import Report
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.augment_images import ImageViews, Pixels
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.data.batches.shards import ArrayShard, EvalSource, TrainSource
from lichen.data.sources.records import load_records
from lichen.engines.local import LocalEngine
from lichen.models.students.students import ImageMLP
from lichen.server.allow_empty import AllowEmpty
from lichen.server.mean import Mean
from lichen.server.optimize import ServerSGD
from lichen.server.sampling import Everyone, Poisson, Uniform
from lichen.transforms.codec import Chain
from lichen.transforms.downlink import WHOLE, Deltas

MODEL = ImageMLP(64, hidden=(64,), classes=10)
CLIENTS = 8
VIEWS = ImageViews(side=8, weak=Pixels(), strong=Pixels(rotate=15, gain=0.2))


@pytest.fixture(scope="module")
def parts() -> dict[str, ArrayShard]:
    """Forty labelled digits for the server, 800 without label for the clients, the rest to judge by."""
    records = load_records("digits")
    order = np.random.default_rng(1).permutation(len(records))
    x = np.stack([np.asarray(records[i].features).reshape(64) for i in order])
    y = np.array([int(records[i].label) for i in order])
    cuts = {"server": slice(40), "clients": slice(40, 840), "test": slice(840, None)}
    return {name: ArrayShard(x=x[cut], labels=y[cut]) for name, cut in cuts.items()}


def made(
    parts: dict[str, ArrayShard],
    folder: Path,
    *,
    block: int = 8,
    lr: float = 0.2,
    threshold: float = 0.9,
    **more: Any,
) -> tuple[SemiFL, LocalEngine]:
    train = Train(MODEL, optimizer=ClientOptimizer("sgd", lr=0.2))
    bare = parts["clients"]
    local = [ArrayShard(x=bare.x[c::CLIENTS], labels=np.full(len(bare.x[c::CLIENTS]), -100)) for c in range(CLIENTS)]
    source = ScarceLabels(TrainSource(local, batch_size=1, steps=5), unlabelled_rows=32, replacement=True)
    match = FixAndMix(train, VIEWS, source, threshold=threshold)
    judge = ClientTask(work=Evaluate(MODEL), source=EvalSource([parts["test"]] * CLIENTS, batch_size=256))
    client_tasks = {"train": ClientTask(work=match, source=source), "valid": judge}
    engine = LocalEngine(client_tasks, ClientStore(folder / "clients"), block_size=block)
    tune = Train(MODEL, optimizer=ClientOptimizer("sgd", lr=lr))
    own = ClientTask(work=tune, source=TrainSource([parts["server"]], batch_size=20, steps=8))
    server = LocalEngine({"server": own}, ClientStore(folder / "server"))
    average = Average(
        aggregator=Mean(),
        optimizer=ServerSGD(),
        sampler=more.pop("sampler", Everyone()),
        weight_N=torch.ones(CLIENTS, dtype=torch.float64),
        rounds=4,
        valid=more.pop("valid", None),
        downlink=more.pop("downlink", WHOLE),
    )
    return SemiFL(average, server=server, seed=3, **more), engine


def same(a: Any, b: Any) -> bool:
    a, b = (x.flat() if isinstance(x, Shared) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_the_server_goes_first_and_after_every_round(parts: Any, tmp_path: Path) -> None:
    algorithm, engine = made(parts, tmp_path, threshold=0.15)
    start = MODEL.init(0)
    state = algorithm.init(Shared.of_flat(start))
    tuned, loss = algorithm._tuned.tune(Shared.of_flat(start), -1)
    assert same(state.shared, tuned)
    assert not same(tuned, start)
    _, other = made(parts, tmp_path / "b", threshold=0.15)
    plain, _ = algorithm.clients.round(algorithm.clients.init(state.shared), other, 7)
    expected, second = algorithm._tuned.tune(plain.shared, 0)
    state, report = algorithm.round(state, engine, 7)
    assert same(state.shared, expected)
    assert report.metrics["server_loss"] == second < loss
    assert algorithm.server.bytes_up > 0  # its own engine's count, which is in no report
    assert (report.bytes_up, report.bytes_down) == (engine.bytes_up, engine.bytes_down)


def test_killed_and_resumed_in_any_blocks_it_ends_with_the_same_bytes(parts: Any, tmp_path: Path) -> None:
    seen: list[Report] = []
    whole, engine = made(parts, tmp_path / "a", sampler=Uniform(3), valid="valid")
    end = run(whole, engine, lambda: Shared(MODEL.init(0)), rounds=4, seed=5, observers=[seen.append])
    file = tmp_path / "state"
    for rounds, block in ((2, 1), (4, 2)):
        again, engine = made(parts, tmp_path / f"b{rounds}", block=block, sampler=Uniform(3), valid="valid")
        state = run(again, engine, lambda: Shared(MODEL.init(0)), rounds=rounds, seed=5, checkpoint=file)
    assert same(state.shared, end.shared)
    assert same(state.optimizer, end.optimizer)
    assert int(end.optimizer["server.round"]) == 4
    assert state.best_value == end.best_value == min(r.metrics["valid"] for r in seen)


def test_a_round_nobody_comes_to_and_a_server_that_diverges_change_nothing(parts: Any, tmp_path: Path) -> None:
    nobody, engine = made(parts, tmp_path / "a", sampler=Poisson(1e-12))
    state = nobody.init(Shared(MODEL.init(0)))
    after, report = nobody.round(state, engine, 7)
    assert same(after.shared, state.shared)
    assert after.round == 1
    assert math.isnan(report.metrics["server_loss"])
    wild, _ = made(parts, tmp_path / "b", lr=1e30)
    assert same(wild.init(Shared(MODEL.init(0))).shared, MODEL.init(0))


def test_where_none_is_sure_of_anything_the_server_goes_on_by_itself(parts: Any, tmp_path: Path) -> None:
    algorithm, engine = made(parts, tmp_path, threshold=1.0)
    state = algorithm.init(Shared(MODEL.init(0)))
    after, report = algorithm.round(state, engine, 7)
    assert same(after.shared, algorithm._tuned.tune(state.shared, 0)[0])
    assert (report.metrics["clients"], report.clients) == (0, tuple(range(CLIENTS)))
    rule = AllowEmpty(Mean())
    job = Job(work="train", shared=state.shared, version=0, clients=(0, 1), seed=7)
    (message,) = drain(made(parts, tmp_path / "b", threshold=0.15)[1], job)
    total = rule.add(rule.zero(), message)
    again = rule.merge(rule.load(*rule.dump(total)), rule.zero())
    assert same(rule.close(again, state.shared)[0], Mean().close(Mean().add(Mean().zero(), message), state.shared)[0])


def test_what_cannot_be_is_refused(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="send them the start"):
        made(parts, tmp_path, downlink=Deltas(Chain(), agreed=True))
    empty = {**parts, "server": replace(parts["server"], labels=np.full(40, -100))}
    with pytest.raises(LichenError, match="no labelled row"):
        made(empty, tmp_path)[0].init(Shared(MODEL.init(0)))


def test_unlabelled_clients_improve_on_the_servers_labels(parts: Any, tmp_path: Path) -> None:
    def accuracy(shared: Any) -> float:
        x, y = torch.from_numpy(parts["test"].x), torch.from_numpy(parts["test"].labels)
        return float((MODEL.apply(shared.trainable, x).argmax(-1) == y).double().mean())

    algorithm, engine = made(parts, tmp_path, first=12)
    state = algorithm.init(Shared(MODEL.init(0)))
    alone = state.shared
    for number in range(10):
        state, _ = algorithm.round(state, engine, 100 + number)
        alone, _ = algorithm._tuned.tune(alone, number)
    semi, server = accuracy(state.shared), accuracy(alone)
    assert semi > server + 0.01, (semi, server)
