"""The server learns the sum of what clients send under masks, to the byte, and nothing else, whoever falls silent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.clients.masking.masked import ATTEMPT, Masked, MaskTerms
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.train import Train
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.collecting.receipts import digest_C
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.masks.party import Party
from lichen.core.message import Job, Message
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, TrainSource
from lichen.engines.distributed import DistributedEngine
from lichen.engines.local import LocalEngine
from lichen.engines.masking.unmasking import UnmaskingEngine
from lichen.engines.ranks import Ranks
from lichen.server.mean import Mean
from support.forked_ranks import on_ranks
from support.toy_cohorts import Softmax

MODEL = Softmax(dtype=torch.float32)
WORK = Train(MODEL, optimizer=ClientOptimizer(name="sgd", lr=0.5))
SHARED = Shared(MODEL.init(0))
RULE = Mean()


@dataclass(frozen=True)
class Silent:
    """Who falls silent in which stage, in the first attempts at a round."""

    stage_of: tuple[tuple[int, int], ...] = ()
    attempts: float = math.inf

    def __call__(self, job: Job, client: int) -> int | None:
        return dict(self.stage_of).get(client) if job.settings.get(ATTEMPT, 0.0) < self.attempts else None


def source(clients: int) -> TrainSource:
    draws = [numpy_generator(3, client) for client in range(clients)]
    shards = [ArrayShard(x=rng.normal(size=(4, 5)).astype("float32"), labels=rng.integers(0, 3, 4)) for rng in draws]
    return TrainSource(tuple(shards), batch_size=2, steps=2)


def masked(clients: int, silent: Silent = Silent()) -> Masked:
    terms = MaskTerms(k=clients - 1, threshold=clients // 2 + 1)
    return Masked(inner=WORK, terms=terms, aggregator=RULE, drops_out=silent)


def job(clients: int) -> Job:
    return Job(work="train", shared=SHARED, version=3, clients=tuple(range(clients)), seed=5)


def local(folder: Path, work: Any, clients: int, block: int) -> LocalEngine:
    return LocalEngine({"train": ClientTask(work=work, source=source(clients))}, ClientStore(folder), block_size=block)


def under_masks(engine: Engine, work: Masked, clients: int, attempts: int = 1) -> Collected:
    around = UnmaskingEngine(engine, {"train": work}, attempts=attempts)
    return collect(around, [job(clients)], RULE, admission=Admission(works={"train": work}))


def plain(folder: Path, clients: int, left: tuple[int, ...]) -> Collected:
    engine = local(folder, WORK, clients, 1)
    asked = replace(job(clients), clients=left)
    return collect(engine, [asked], RULE, admission=Admission(works={"train": WORK}))


def change(came: Collected) -> bytes:
    closed, _ = RULE.close(came.total, SHARED)
    return b"".join(closed.trainable[name].numpy().tobytes() for name in sorted(closed.trainable))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clients", [5, 20])
def test_the_sum_has_the_bytes_of_a_round_without_masks(tmp_path: Path, clients: int, stage: int, block: int) -> None:
    gone = tuple(range(1, clients, 3))[: round(0.3 * clients)]
    work = masked(clients, Silent(tuple((client, stage) for client in gone)))
    came = under_masks(local(tmp_path / "masked", work, clients, block), work, clients)
    left = tuple(c for c in range(clients) if stage == 3 or c not in gone)  # what was sent before the last stage counts
    assert came.client_N.tolist() == list(left)
    expected = plain(tmp_path / "plain", clients, left)
    assert change(came) == change(expected)
    for name, x_N in expected.metrics.items():
        torch.testing.assert_close(came.metrics[name].sum(0), x_N.sum(0), rtol=0, atol=len(left) * 2.0**-24)
    assert {refusal.client for refusal in came.attendance.named} == set(gone) - set(left)


def test_nothing_of_one_client_is_handed_over(tmp_path: Path) -> None:
    work = masked(5)
    came = under_masks(local(tmp_path, work, 5, 2), work, 5)
    for x_N in came.metrics.values():
        assert not x_N[1:].any()
    assert not came.weight_N.any()
    assert came.total.lifted == 5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_sum_of_too_few_is_given_up_by_name(tmp_path: Path, stage: int) -> None:
    work = masked(5, Silent(tuple((client, stage) for client in (0, 2, 4))))
    came = under_masks(local(tmp_path, work, 5, 2), work, 5)
    assert came.client_N.tolist() == []
    assert RULE.clients(came.total) == 0
    told = [refusal for refusal in came.attendance.named if refusal.client in (1, 3)]
    assert {refusal.client for refusal in told} == {1, 3}
    assert all(refusal.what for refusal in told)


def test_a_round_that_could_not_be_opened_is_begun_again_with_other_keys(tmp_path: Path) -> None:
    work = masked(5, Silent(tuple((client, 2) for client in (0, 2, 4)), attempts=1))
    came = under_masks(local(tmp_path / "a", work, 5, 2), work, 5, attempts=2)
    assert change(came) == change(plain(tmp_path / "b", 5, tuple(range(5))))


def test_who_lied_is_not_invited_to_the_round_that_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1 deals boxes that do not hold its commitments; too many others fall silent, so the round is repeated."""
    honest, invited = Party.share, list[tuple[int, ...]]()

    def share(party: Party, *said: Any) -> Any:
        sealed, commitments = honest(party, *said)
        if party._client == 1:
            sealed = sealed.copy()
            sealed[0, -1] ^= 1
        return sealed, commitments

    class Watched(LocalEngine):
        def submit(self, job: Job) -> int:
            invited.append(job.clients)
            return super().submit(job)

    monkeypatch.setattr(Party, "share", share)
    work = masked(7, Silent(tuple((client, 2) for client in (0, 2, 4)), attempts=1))
    client_tasks = {"train": ClientTask(work=work, source=source(7))}
    came = under_masks(Watched(client_tasks, ClientStore(tmp_path / "a"), block_size=2), work, 7, attempts=2)
    left = (0, 2, 3, 4, 5, 6)
    assert invited == [tuple(range(7)), left]
    assert change(came) == change(plain(tmp_path / "b", 7, left))
    assert [(refusal.client, refusal.reason) for refusal in came.attendance.named] == [(1, "masks")]
    assert "commitments" in came.attendance.named[0].what


def test_jobs_without_masks_pass(tmp_path: Path) -> None:
    engine = UnmaskingEngine(local(tmp_path / "a", WORK, 5, 2), {})
    came = collect(engine, [job(5)], RULE, admission=Admission(works={"train": WORK}))
    assert change(came) == change(plain(tmp_path / "b", 5, tuple(range(5))))


def on_each_rank(folder: Path, ranks: Ranks, work: Masked) -> list[Any]:
    engine = DistributedEngine(local(folder, work, 7, 2), ranks)
    came = under_masks(engine, work, 7)
    return [came.client_N.tolist(), change(came).hex(), {n: x.sum(0).tolist() for n, x in came.metrics.items()}]


@pytest.mark.parametrize("silent", [Silent(), Silent(((2, 1), (5, 2)))])
def test_ranks_open_one_sum(tmp_path: Path, silent: Silent) -> None:
    work = masked(7, silent)
    first, second = (said["value"] for said in on_ranks(2, lambda ranks: on_each_rank(tmp_path, ranks, work)))
    assert first == second
    left = tuple(client for client in range(7) if client not in dict(silent.stage_of))
    assert first[0] == list(left)
    assert first[1] == change(plain(tmp_path / "plain", 7, left)).hex()


def test_rows_that_lie_in_memory_once_have_the_digest_of_rows_apart() -> None:
    zeros = torch.zeros(1, 3, dtype=torch.int64).expand(4, 3)
    ids = torch.arange(4)

    def digests(x_C: torch.Tensor) -> torch.Tensor:
        tensors = {"a": x_C, "b": torch.arange(4.0)}
        return digest_C(
            Message(group="g", client_C=ids, version_C=ids * 0, tensors=tensors, weight_C=torch.zeros(4).double())
        )

    assert torch.equal(digests(zeros), digests(zeros.contiguous()))
