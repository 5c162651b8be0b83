"""Training alone: nothing leaves, everybody keeps the best round, and a kill at any place changes no byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lichen.algorithms.alone import Alone
from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import Report
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.replies import Reply
from lichen.core.rounds import run
from lichen.core.store import ClientStore
from lichen.engines.around import AroundEngine
from lichen.recipes.assemble.experiment import Experiment
from support.small_experiment import engine, experiment

ROUNDS = 5


class Killed(BaseException):
    """What a kill is to the process itself."""


def killed_before(inner: Engine, work: str, count: int) -> Engine:
    """An engine whose process ends when it is asked for ``work`` the ``count``-th time."""
    left = [count]

    def on_job(job: Job) -> Job:
        left[0] -= job.work == work
        if job.work == work and left[0] == 0:
            raise Killed
        return job

    return AroundEngine(inner, on_job=on_job)


def killed_amid(inner: Engine, work: str, count: int) -> Engine:
    """The same, after the first block of clients."""
    seen = list[Job]()

    def on_reply(reply: Reply, job: Job) -> Iterator[Reply]:
        if job.work == work and job not in seen:
            seen.append(job)
        yield reply
        if job.work == work and len(seen) == count:
            raise Killed

    return AroundEngine(inner, on_reply=on_reply)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.safetensors"))}


def go(made: Experiment, there: Engine, folder: Path, *, every: int) -> list[Report]:
    seen: list[Report] = []
    algorithm = Alone(clients=4, rounds=ROUNDS, work="alone lr=0.1", valid="alone.valid", valid_every=every)
    run(
        algorithm,
        there,
        lambda: made.start,
        rounds=ROUNDS,
        seed=1,
        checkpoint=folder / "server.safetensors",
        observers=[seen.append],
    )
    return seen


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", [killed_before, killed_amid])
@pytest.mark.parametrize(("work", "count"), [("alone.valid", 1), ("alone.valid", 2), ("alone lr=0.1", 4)])
def test_a_kill_inside_a_round_changes_no_byte(
    tmp_path: Path, kind: type[killed_before], work: str, count: int, every: int
) -> None:
    made, whole, cut = experiment(), tmp_path / "whole", tmp_path / "cut"
    told = go(made, engine(made, whole / "clients"), whole, every=every)
    with pytest.raises(Killed):
        go(made, kind(engine(made, cut / "clients"), work, count), cut, every=every)
    again = go(made, engine(made, cut / "clients"), cut, every=every)
    assert 0 < len(again) <= ROUNDS
    assert files(whole) == files(cut)
    assert [dict(r.metrics) for r in again] == [dict(r.metrics) for r in told[ROUNDS - len(again) :]]


def test_a_round_whose_checkpoint_was_never_written_is_repeated_with_equal_bytes(tmp_path: Path) -> None:
    made = experiment()
    go(made, engine(made, tmp_path / "clients"), tmp_path, every=1)
    whole = files(tmp_path)
    checkpoint = tmp_path / "server.safetensors"
    # The clients are at the end of the last round, the server is not.
    checkpoint.unlink()
    algorithm = Alone(clients=4, rounds=ROUNDS, work="alone lr=0.1", valid="alone.valid")
    elsewhere = engine(made, tmp_path / "elsewhere")
    run(algorithm, elsewhere, lambda: made.start, rounds=ROUNDS - 1, seed=1, checkpoint=checkpoint)
    for file in (tmp_path / "elsewhere").rglob("*.safetensors"):
        file.unlink()
    go(made, engine(made, tmp_path / "clients"), tmp_path, every=1)
    assert files(tmp_path) == whole


def test_everybody_keeps_its_own_best_round_and_nothing_leaves(tmp_path: Path) -> None:
    made = experiment()
    there = engine(made, tmp_path / "clients")
    told = go(made, there, tmp_path, every=1)
    assert all((r.bytes_up, r.bytes_down) == (0, 0) for r in told)
    assert all(r.clients == (0, 1, 2, 3) for r in told)
    own = ClientStore(tmp_path / "clients").load((0, 1, 2, 3), 2 * ROUNDS)
    assert own is not None
    judged = Job(work="alone.chosen", shared=made.start, version=2 * ROUNDS, clients=(0, 1, 2, 3), seed=0)
    for message in drain(there, judged):
        assert message.tensors == {}
        for i, client in enumerate(message.client_C.tolist()):
            mean = message.metrics["loss_sum"][i] / message.metrics["count"][i]
            assert torch.equal(mean, own["best_value"][client])
    assert all(1 <= int(v) <= 2 * ROUNDS and int(v) % 2 == 1 for v in own["best_version"])


def test_one_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    made = experiment(broken=(2,))
    told = go(made, engine(made, tmp_path / "clients"), tmp_path, every=1)
    own = ClientStore(tmp_path / "clients").load((0, 1, 2, 3), 2 * ROUNDS)
    assert own is not None
    assert len(told) == ROUNDS
    for name, start in made.start.trainable.items():
        params_C = own[f"params/{name}"]
        assert params_C.isfinite().all()
        assert torch.equal(params_C[2], start)
    weight = next(name for name in made.start.trainable if name.endswith("weight"))
    assert not torch.equal(own[f"params/{weight}"][0], made.start.trainable[weight])
