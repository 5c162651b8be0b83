"""Estimates memory, disk and cost, and says what will not fit."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

from lichen.core.collecting.history import History
from lichen.core.contracts.client import ClientWork, Dialogue
from lichen.core.expected import ANY, Expected
from lichen.core.fold import BEST
from lichen.core.message import Job, Message
from lichen.present.units import bytes_text
from lichen.recipes.assemble.capacity import DeviceTier
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.parts import initial_shared, works_of
from lichen.recipes.assemble.sides.personal import keeps_own
from lichen.recipes.plan.traffic import TrafficEstimate
from lichen.recipes.schema.recipe import Recipe
from lichen.transforms.transform import Transformed

__all__ = ["MODELS", "Cost", "Disk", "Estimate", "Memory", "Problem", "disk_of", "free_disk_bytes", "problems"]

MODELS = "models"
"""The column of scores by all models of a stream."""

ABOUT = 4096
"""Bytes of what is said of a job beside a message, at most."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the process, or of its accelerator.

    Attributes:
        base: Of the frozen model.
        loaded: Held once everything is loaded.
        client: That a client adds to a block.
        block: That the largest block adds.
        clients: In that block.
        peak: The most expected.
        available: The most there is.
        copies: Processes that hold the base beside this one.
    """

    base: int
    loaded: int
    client: int
    block: int
    clients: int
    peak: int
    available: int
    copies: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Bytes in the run's folder.

    Attributes:
        private: Clients' private state.
        shared: The server's checkpoints.
        free: What the disk has left.
        history: Clients' messages that the server keeps, at most.
        checkpoints: Earlier states that stay, with the private state that goes with them.
    """

    private: int
    shared: int
    free: int
    history: int = 0
    checkpoints: int = 0

    @property
    def needed(self) -> int:
        """All that is written."""
        return self.private + self.shared + self.history + self.checkpoints


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one column takes, all learning rates together.

    Attributes:
        seconds: Expected wall time.
        train_tokens: Tokens trained on, or rows where there are none.
        evaluate_tokens: Tokens evaluated.
        train_flops: Floating-point operations of training.
        evaluate_flops: Of evaluation.
    """

    seconds: float
    train_tokens: float = 0.0
    evaluate_tokens: float = 0.0
    train_flops: float = 0.0
    evaluate_flops: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that will not fit.

    Attributes:
        what: What is too large, and by how much.
        change: What can be done.
    """

    what: str
    change: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a task finds out.

    Attributes:
        clients: How many.
        trained: Parameters that are trained.
        frozen: Parameters that are not.
        bytes: What crosses in the federated column.
        memory: Of the process, or of its accelerator.
        disk: What the run's folder will hold.
        columns: Cost of every column.
        start: Seconds of loading.
        notes: How far the numbers reach.
        seen: What every trained column sees of the clients' rows.
        rooms: What clients of each memory train, where the recipe gives their memory.
        read: What was read of the data.
        privacy: What noise will promise, by round, and how large it is; None where there is none.
        masks: What masks promise and cost, stage by stage; None where there are none.
        split: Bytes of both sides of a split model, and of a token and step; None where it is not split.
        hosts: Of a pipeline: blocks and bytes of weights of each host, seconds of all training were each a machine of
            its own, and the share of them in which hosts wait; None where there is none.
        drift: Who sends sums that look for drift, and their bytes; None where nobody looks.
    """

    clients: int
    trained: int
    frozen: int
    bytes: TrafficEstimate
    memory: Memory
    disk: Disk
    columns: Mapping[str, Cost]
    start: float
    notes: tuple[str, ...] = ()
    seen: Mapping[str, Any] = field(default_factory=dict)
    rooms: tuple[DeviceTier, ...] = ()
    read: Mapping[str, Any] | None = None
    privacy: Mapping[str, Any] | None = None
    masks: Mapping[str, Any] | None = None
    split: Mapping[str, int] | None = None
    hosts: Mapping[str, Any] | None = None
    drift: Mapping[str, int] | None = None


def free_disk_bytes() -> int:
    """Bytes the disk of temporary files has left."""
    return shutil.disk_usage(tempfile.gettempdir()).free


def _retained(rounds: Sequence[int]) -> int:
    """Versions of a client's private state that :class:`lichen.core.store.ClientStore` keeps after these rounds."""
    there: list[int] = []
    for version in rounds:
        there.append(version)
        needed = max((old for old in there if old <= version - 2), default=0)
        there = [old for old in there if old >= needed]
    return len(there)


def disk_of(
    experiment: Experiment,
    private: Mapping[str, int],
    columns: Sequence[str],
    *,
    own: int,
    invited: Sequence[Sequence[int]],
    sent: int,
) -> Disk:
    """What a run's folder will hold.

    Args:
        experiment: The recipe's.
        private: Bytes of one client's private state, by column of training alone.
        columns: Those that are run.
        own: Bytes of one version of what a client of the federation keeps.
        invited: The clients of every round.
        sent: Bytes of one client's message.
    """
    rates = len(experiment.recipe.optimizer.lr)
    rounds: dict[int, list[int]] = {}
    for version, who in enumerate(invited, start=1):
        for client in who:
            rounds.setdefault(client, []).append(version)
    best = 1 if keeps_own(experiment.recipe) else 0  # what belongs to the best round stays beside the newest
    retained = own * sum(_retained(versions) + best for versions in rounds.values())
    everyone = len(experiment.server.roster)
    clients = {"alone": everyone, "alone_best": everyone, "personal": everyone, "pooled": 1}
    once, begun = experiment.start.nbytes, initial_shared(experiment.server, experiment.recipe.optimizer.lr[0]).nbytes
    server = experiment.recipe.federation.server
    moments = {"sgd": server.momentum > 0, "adam": 2, "yogi": 2}[server.name]
    state = 2 * begun + once * int(moments)
    every = experiment.recipe.engine.history
    staying = [invited[at - every : at] for at in range(every, len(invited) + 1, every)] if every else []
    # What a client has not changed since the checkpoint before is one file for both.
    changed = sum(len({client for who in rounds_between for client in who}) for rounds_between in staying)
    grids = rates * sum(name not in ("base", "federated") for name in columns)
    return Disk(
        private=rates * (retained + sum(clients[name] * each for name, each in private.items())),
        # A state and the one before it.
        shared=2 * (grids * once + ("federated" in columns) * rates * state),
        free=free_disk_bytes(),
        history=rates
        * sum(name in ("federated", "without") for name in columns)
        * history_bytes(experiment, invited, sent),
        checkpoints=rates * (len(staying) * state + own * changed),
    )


def history_bytes(experiment: Experiment, invited: Sequence[Sequence[int]], sent: int) -> int:
    """Bytes of the messages that a federation's server keeps, at most; 0 where it keeps none.

    Args:
        experiment: The recipe's.
        invited: The clients of every round.
        sent: Bytes of one client's message, for works that leave the length of one open.
    """
    server, recipe = experiment.server, experiment.recipe
    if not recipe.federation.history:
        return 0
    lr = recipe.optimizer.lr[0]
    # What is retained is what an aggregator takes: no codec is in between.
    work: ClientWork | Dialogue = works_of(server)[f"train {lr_name(lr)}"]
    work = work.inner if isinstance(work, Transformed) else work
    shared, total = initial_shared(server, lr), 0
    known: dict[Hashable, int] = {}
    for round_, who in enumerate(invited):
        job = Job(
            work=f"train {lr_name(lr)}",
            shared=shared,
            version=round_,
            clients=(len(server.roster),),
            seed=2**63 - 1,
            base=server.model.base,
            settings={"lr_scale": 1 / 3, BEST: float(round_)},
        )
        expected = work.expected(job)
        specs = tuple(sorted(expected.tensors.items(), key=lambda pair: pair[0]))
        if specs not in known:
            known[specs] = _retained_bytes(expected, job, sent)
        total += len(who) * known[specs]
    return total


def _retained_bytes(expected: Expected, job: Job, sent: int) -> int:
    """Bytes of the file of one client's message, at most."""
    if any(ANY in spec.shape for spec in expected.tensors.values()):
        return sent + ABOUT
    ids = torch.tensor(job.clients)
    message = Message(
        group=expected.group,
        client_C=ids,
        version_C=ids,
        tensors={name: torch.zeros(1, *spec.shape, dtype=spec.dtype) for name, spec in expected.tensors.items()},
        weight_C=torch.zeros(1, dtype=torch.float64),
        metrics={name: torch.zeros(1, *spec.shape, dtype=torch.float64) for name, spec in expected.metrics.items()},
    )
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder))
        history.put(0, message, job)
        return history.nbytes()


def problems(recipe: Recipe, memory: Memory, disk: Disk) -> tuple[Problem, ...]:
    """What will not fit, each with the keys that change it."""
    found = []
    there, whole = memory.available, memory.peak + memory.copies * memory.loaded
    if whole > there:
        changes = []
        fits = math.floor((there - memory.loaded * (1 + memory.copies)) / memory.client) if memory.client else 0
        if 1 <= fits < memory.clients:
            changes.append(f"set engine.clients_per_block to {fits}")
        elif memory.copies:
            changes.append("lower engine.nodes, or set engine.name to local")
        else:
            changes.append("lower data.max_length, federation.batch_size or model.adapter.rank")
        if recipe.model.dtype != "bfloat16" and memory.base > there // 10:
            changes.append("set model.dtype to bfloat16")
        if fits < 1 and recipe.model.name is not None and recipe.engine.gradient_checkpointing is not True:
            changes.append("set engine.gradient_checkpointing to true")
        if fits < 1:
            changes.append("choose another model.device or a smaller model")
        what = f"memory: {bytes_text(whole)} are needed and {bytes_text(there)} are there"
        found.append(Problem(what=what, change="; or ".join(changes)))
    if disk.needed > disk.free:
        what = f"disk: {bytes_text(disk.needed)} are needed and {bytes_text(disk.free)} are free"
        change = "set federation.history to false; or " if disk.history else ""
        change += "raise engine.history, or set it to 0; or " if disk.checkpoints else ""
        change += "try fewer rates in optimizer.lr; or lower model.adapter.rank; or take alone out of compare.baselines"
        found.append(Problem(what=what, change=change))
    return tuple(found)
