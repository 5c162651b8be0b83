"""Clients watch their own losses: in their rows' order, on from where they were, and nothing but alarms leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.clients.drift.loss_watch import LossWatch
from lichen.clients.drift.periods import LossReport, watch_losses
from lichen.clients.masking.masked import Masked, MaskTerms
from lichen.core.collecting.admission import Admission
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.engines.distributed import DistributedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.masking.unmasking import UnmaskingEngine
from lichen.fl.testing import check_client_task, check_expected
from lichen.models.students.students import ImageMLP
from lichen.server.drift.detector import watch
from lichen.server.drift.page_hinkley import PageHinkley
from lichen.server.drift.standardised import Standardised
from support.forked_ranks import on_ranks

MLP = ImageMLP(4, hidden=(8,), classes=3)
SHARED = Shared(MLP.init(0))
DETECTOR = Standardised(PageHinkley(0.15, threshold=15.0), beginning=20)


def rows(client: int, period: int, wrong: bool, count: int = 40) -> ArrayShard:
    """Rows with the class that the model is sure of, or with another."""
    x = np.random.default_rng([client, period]).normal(size=(count, 4)).astype(np.float32)
    sure = MLP.apply(SHARED.trainable, torch.from_numpy(x)).argmax(-1).numpy()
    return ArrayShard(x=x, labels=(sure + wrong) % 3)


def task(shards: list[ArrayShard], batch_size: int = 7) -> ClientTask:
    return ClientTask(work=LossWatch(MLP, DETECTOR), source=EvalSource(shards, batch_size=batch_size))


def job(period: int, clients: int) -> Job:
    return Job(work="watch", shared=SHARED, version=period, clients=tuple(range(clients)), seed=0)


def losses(shard: ArrayShard) -> list[float]:
    logits = MLP.apply(SHARED.trainable, torch.from_numpy(shard.x))
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(shard.labels), reduction="none").tolist()


def stream(folder: Path, drifted: set[int], periods: int = 4, block: int = 8) -> list[LossReport]:
    """Four clients, of whom some see other labels from the third period on; the last one has no rows."""
    store, reports = ClientStore(folder), []
    for period in range(periods):
        shards = [rows(c, period, c in drifted and period >= 2, 0 if c == 3 else 40) for c in range(4)]
        engine = LocalEngine({"watch": task(shards)}, store, block_size=block)
        reports.append(watch_losses(engine, job(period, 4), share=0.5))
    return reports


def test_clients_whose_labels_change_are_counted(tmp_path: Path) -> None:
    reports = stream(tmp_path, {0, 1})
    assert [report.watched for report in reports] == [3, 3, 3, 3]
    assert [report.alarmed for report in reports] == [0, 0, 2, 0]
    assert [report.alarm for report in reports] == [False, False, True, False]
    assert [report.alarm for report in stream(tmp_path / "one", {2})] == [False] * 4
    assert [report.alarmed for report in stream(tmp_path / "quiet", set(), block=1)] == [0] * 4


def test_it_is_the_detector_over_all_losses_in_order_whatever_the_batches(tmp_path: Path) -> None:
    parts = [rows(5, period, period == 2) for period in range(3)]
    whole, alarms = watch(DETECTOR, [loss for part in parts for loss in losses(part)])
    assert len(alarms) == 1
    for batch_size in (1, 40):
        store = ClientStore(tmp_path / str(batch_size))
        for period, part in enumerate(parts):
            watch_losses(LocalEngine({"watch": task([part], batch_size)}, store), job(period, 1))
        own_C = store.load([0], 3)
        assert own_C is not None
        torch.testing.assert_close(own_C["drift/detector"][0], DETECTOR.dump(whole), rtol=1e-4, atol=1e-4)


def test_a_period_that_is_repeated_gives_the_same_state(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    engine = LocalEngine({"watch": task([rows(0, 0, False)])}, store)
    first = watch_losses(engine, job(0, 1))
    digest = store.digest(0, 1)
    assert digest
    assert watch_losses(engine, job(0, 1)) == first
    assert store.digest(0, 1) == digest


def test_other_private_state_stays(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    store.stage([0], 1, {"own/w": torch.ones(1, 2)})
    watch_losses(LocalEngine({"watch": task([rows(0, 0, False)])}, store), job(1, 1))
    own_C = store.load([0], 2)
    assert own_C is not None
    assert sorted(own_C) == ["drift/detector", "drift/last_alarm", "own/w"]


def test_a_client_alone_and_in_company_sends_the_same_and_what_it_declares() -> None:
    one = task([rows(c, 0, c == 1, 40) for c in range(3)])
    check_client_task(one, job(0, 3))
    check_expected(one, job(0, 3))


def test_no_loss_is_in_the_message(tmp_path: Path) -> None:
    engine = LocalEngine({"watch": task([rows(c, 0, True) for c in range(2)])}, ClientStore(tmp_path))
    number = engine.submit(job(0, 2))
    for reply in engine.replies((number,)):
        assert reply.message is not None
        assert not reply.message.tensors
        for x_C in (reply.message.weight_C, *reply.message.metrics.values()):
            assert set(x_C.tolist()) <= {0.0, 1.0}


def test_alarms_add_up_under_masks(tmp_path: Path) -> None:
    plain = stream(tmp_path / "plain", {0, 1}, periods=3)[-1]
    store = ClientStore(tmp_path / "masked")
    for period in range(3):
        shards = [rows(c, period, c in {0, 1} and period >= 2, 0 if c == 3 else 40) for c in range(4)]
        work = Masked(inner=LossWatch(MLP, DETECTOR), terms=MaskTerms(k=3, threshold=3))
        inner = LocalEngine({"watch": ClientTask(work=work, source=task(shards).source)}, store)
        works: Any = {"watch": work}
        report = watch_losses(
            UnmaskingEngine(inner, works), job(period, 4), share=0.5, admission=Admission(works=works)
        )
    assert report == plain


def test_ranks_count_all_clients_and_their_detectors_have_the_bits_of_one_process(tmp_path: Path) -> None:
    def reports(folder: Path, around: Callable[[LocalEngine], Engine]) -> list[list[float]]:
        store, found = ClientStore(folder), []
        for period in range(3):
            shards = [rows(c, period, c in {0, 1} and period >= 2) for c in range(4)]
            report = watch_losses(around(LocalEngine({"watch": task(shards)}, store)), job(period, 4))
            found.append([report.alarmed, report.watched])
        return found

    one = reports(tmp_path / "one", lambda local: local)
    every = on_ranks(2, lambda ranks: reports(tmp_path / "two", lambda local: DistributedEngine(local, ranks)))
    assert [said["value"] for said in every] == [one, one]
    assert one[-1] == [2, 4]
    stores = [ClientStore(tmp_path / name) for name in ("one", "two")]
    assert len({tuple(store.digest(c, 3) for c in range(4)) for store in stores}) == 1


def test_clients_that_see_a_drift_in_different_periods_are_counted_as_long_as_is_asked(tmp_path: Path) -> None:
    reports = []
    for recent in (1, 2, 9):
        store, alarmed = ClientStore(tmp_path / str(recent)), []
        for period in range(6):
            shards = [rows(c, period, period >= 2 + c) for c in range(2)]  # the second a period later
            report = watch_losses(LocalEngine({"watch": task(shards)}, store), job(period, 2), recent=recent)
            alarmed.append(report.alarmed)
        reports.append(alarmed)
    assert reports == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 2, 1, 0], [0, 0, 1, 2, 2, 2]]


def test_a_share_that_is_none_is_refused(tmp_path: Path) -> None:
    engine = LocalEngine({"watch": task([rows(0, 0, False)])}, ClientStore(tmp_path))
    with pytest.raises(LichenError, match="share 0"):
        watch_losses(engine, job(0, 1), share=0.0)
    with pytest.raises(LichenError, match="of 0 periods"):
        watch_losses(engine, job(0, 1), recent=0)
