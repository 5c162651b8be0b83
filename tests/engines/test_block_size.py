"""Blocks found from measured memory, and what happens when memory runs out all the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import equality
import pytest
import torch

from lichen.clients.distillation.distill import Distill
from lichen.clients.distillation.private_models import LocalInit
from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.training.diloco import Worker
from lichen.clients.training.optimize import ClientOptimizer
from lichen.clients.training.row_weights import ByRows
from lichen.clients.training.train import Train
from lichen.core.contracts.client import ClientTask, ClientWork
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import Job
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.store import ClientStore
from lichen.core.tree import nbytes
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.data.batches.poisson_rows import PoissonRows
from lichen.data.batches.shards import TextShard, TrainSource
from lichen.engines import block_size
from lichen.engines.block_size import AutoBlockSize, ClientMemory, need_of
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.transforms.parse import parse_codecs
from lichen.transforms.transform import Transformed
from lichen.transforms.uplink import Coded

CLIENTS = 7


def _station(*, batch: int = 2) -> tuple[ClientTask, CausalCohort]:
    import numpy as np

    model = equality.tiny("llama")
    cohort = CausalCohort(model, adapter=Lora(targets=("q_proj",), rank=2), name="llama", reference=False)
    rows = [np.arange(2, 22, dtype=np.int32) for _ in range(4)]
    shards = [TextShard(tuple(rows), labels=tuple(rows), kind="lm") for _ in range(CLIENTS)]
    source = TrainSource(shards, batch_size=batch, steps=2, fixed_width=24)
    return ClientTask(work=Train(cohort, optimizer=ClientOptimizer("adamw", lr=0.01)), source=source), cohort


def _inside(client_task: ClientTask) -> CausalCohort:
    """The model that is trained inside all wrappers."""
    train = innermost(client_task.work)
    assert isinstance(train, Train)
    assert isinstance(train.model, CausalCohort)
    return train.model


def _job(cohort: CausalCohort) -> Job:
    return Job(work="train", shared=Shared(cohort.init(0)), version=0, clients=tuple(range(CLIENTS)), seed=0)


def test_bytes_a_token_hardly_depend_on_the_rows_looked_at() -> None:
    few, many = (need_of(_job(cohort), client_task) for client_task, cohort in (_station(batch=1), _station(batch=4)))
    assert (few.tokens, many.tokens) == (20, 80)
    assert 0.7 < few.token_bytes / many.token_bytes < 1.5
    assert few.client_bytes == many.client_bytes > 0


def test_layers_computed_again_keep_less() -> None:
    client_task, cohort = _station()
    whole = need_of(_job(cohort), client_task).token_bytes
    again = replace(client_task, work=Train(cohort.checkpointed(), optimizer=ClientOptimizer("adamw", lr=0.01)))
    assert need_of(_job(cohort), again).token_bytes < whole / 2
    assert need_of(_job(cohort), client_task).token_bytes == whole


def test_a_client_that_does_not_fit_is_computed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client_task, cohort = _station()
    need = need_of(_job(cohort), client_task)
    monkeypatch.setattr(block_size, "device_free_bytes", lambda device: int(1.9 * need.step_bytes))
    assert AutoBlockSize(None, may_checkpoint=False)(_job(cohort), client_task) == (1, client_task)
    found = AutoBlockSize(tmp_path / "blocks.json")
    block, again = found(_job(cohort), client_task)
    assert block >= 1
    assert _inside(again).checkpointing
    assert not cohort.checkpointing
    monkeypatch.setattr(block_size, "device_free_bytes", lambda device: 0)
    assert _inside(found(_job(cohort), client_task)[1]).checkpointing
    assert AutoBlockSize(tmp_path / "blocks.json")(_job(cohort), client_task) == (block, client_task), "remembered"


WRAPPED: dict[str, Callable[[Train], ClientWork]] = {
    "weighed": lambda train: ByRows(train, (3,) * CLIENTS),
    "coded": lambda train: Transformed(train, (Coded(parse_codecs(("int8",))),)),
    "at home": lambda train: LocalInit(train, start=Shared()),
    "answered": Distill,
    "diloco": Worker,
    "diloco, weighed and coded": lambda train: Transformed(
        ByRows(Worker(train), (3,) * CLIENTS), (Coded(parse_codecs(("int8",))),)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_goes_around_training_hides_none_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client_task, cohort = _station()
    assert isinstance(client_task.work, Train)
    job, inside = _job(cohort), replace(client_task, work=WRAPPED[name](client_task.work))
    bare, around = need_of(job, client_task), need_of(job, inside)
    assert around.token_bytes == bare.token_bytes > 0
    assert (around.tokens, around.client_bytes > bare.client_bytes) == (bare.tokens, True)
    for free, tight in ((int(1.9 * bare.step_bytes), True), (int(1e12), False)):
        monkeypatch.setattr(block_size, "device_free_bytes", lambda device, free=free: free)
        _, chosen = AutoBlockSize(None)(job, inside)
        assert _inside(chosen).checkpointing == tight
        assert type(chosen.work) is type(inside.work)
        assert not cohort.checkpointing


def test_private_steps_count_a_gradient_for_every_row() -> None:
    client_task, cohort = _station()
    assert isinstance(client_task.work, Train)
    assert isinstance(client_task.source, TrainSource)
    secret, train = SecretRandomness.of_seed(0), replace(client_task.work, weigh_by="one")
    work = PrivateSteps(train, clip=1.0, sigma=1.0, mean_rows_N=(4.0,) * CLIENTS, randomness=secret)
    size = nbytes(cohort.init(0))
    needs = []
    for rows in (2, 4):
        source = PoissonRows(client_task.source, rate_N=(1.0,) * CLIENTS, randomness=secret, batch_rows=rows)
        needs.append(need_of(_job(cohort), ClientTask(work=ByRows(work, (4,) * CLIENTS), source=source)))
    assert needs[1].client_bytes - needs[0].client_bytes == 8 * size
    assert needs[0].client_bytes > need_of(_job(cohort), client_task).client_bytes + 8 * size
    assert needs[1].tokens == 2 * needs[0].tokens == 80


def test_no_more_clients_than_help() -> None:
    need = ClientMemory(token_bytes=1.0, client_bytes=1.0, tokens=100.0)
    assert need.block(1e15, "cpu") == block_size.ENOUGH_TOKENS["cpu"] // 100
    assert ClientMemory(token_bytes=1.0, client_bytes=1.0, tokens=1e9).block(1e15, "cpu") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_block_without_room_is_halved_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    client_task, cohort = _station()
    wanted = {
        int(m.client_C[0]): m for m in serve(_job(cohort), {"train": client_task}, ClientStore(tmp_path), block_size=1)
    }
    step = Train.step
    seen: list[int] = []

    def tight(self: Train, state: Any, batch: Any) -> Any:
        seen.append(len(state.clients))
        if len(state.clients) > 2:
            raise error
        return step(self, state, batch)

    monkeypatch.setattr(Train, "step", tight)
    messages = list(serve(_job(cohort), {"train": client_task}, ClientStore(tmp_path), block_size=CLIENTS))
    assert sorted(c for m in messages for c in m.client_C.tolist()) == list(range(CLIENTS))
    assert seen[:2] == [7, 4]
    assert max(seen[2:]) == 2
    for message in messages:
        for position, client in enumerate(message.client_C.tolist()):
            for name, x in message.tensors.items():
                torch.testing.assert_close(x[position], wanted[client].tensors[name][0], rtol=1e-4, atol=1e-6)


def test_a_single_client_without_room_says_what_to_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client_task, cohort = _station()

    def full(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Train, "step", full)
    with pytest.raises(LichenError, match=r"federation\.batch"):
        list(serve(_job(cohort), {"train": client_task}, ClientStore(tmp_path), block_size=CLIENTS))


def test_other_faults_are_not_taken_for_a_lack_of_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client_task, cohort = _station()

    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Train, "step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        list(serve(_job(cohort), {"train": client_task}, ClientStore(tmp_path), block_size=2))


def test_measuring_leaves_no_graph_behind() -> None:
    def graphs() -> int:
        gc.collect()
        return sum(type(x) is torch.Tensor and x.grad_fn is not None for x in gc.get_objects())

    client_task, cohort = _station(batch=2)
    before = graphs()
    need_of(_job(cohort), client_task)
    assert graphs() == before
