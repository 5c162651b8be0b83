"""Chooses the number of clients per batch from measured memory.

One client's first step is taken with an ear on what the graph keeps for the way back. From bytes a
token and bytes a client follows how many tokens fit into the memory that is free; from what the
processor needs to be busy follows how many are worth having. A processor gains nothing past some
hundred tokens, where its caches end; an accelerator is filled by tens of thousands.

Chen, Xu, Zhang and Guestrin (2016). Training Deep Nets with Sublinear Memory Cost. arXiv:1604.06174
(what to do when a single client does not fit).

Legend: C clients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lichen.clients.personal.training import PersonalTraining
from lichen.clients.privacy.private_steps import PrivateSteps
from lichen.clients.training.gradient_steps import GradientChain
from lichen.clients.training.train import Train
from lichen.clients.training.training_sums import tokens_seen_C
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.message import Job
from lichen.core.wrapping import innermost, layers, with_innermost
from lichen.models.cohort import Cohort
from lichen.models.preference.model import PreferenceModel

__all__ = ["AutoBlockSize", "ClientMemory", "device_free_bytes", "need_of"]

ENOUGH_TOKENS = {"cpu": 640, "cuda": 65536}
"""Tokens a step past which a device gets no faster."""

SHARE = {"cpu": 0.5, "cuda": 0.7}
"""Of the free memory that a block may take; the rest is for what passes through unseen."""

SAMPLE = 8
"""Clients looked at for the tokens of a step."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientMemory:
    """What one client costs.

    Attributes:
        token_bytes: Kept for the way back, a token.
        client_bytes: Parameters, gradients, moments and the message, a client.
        tokens: Of one client's step.
    """

    token_bytes: float
    client_bytes: float
    tokens: float

    @property
    def step_bytes(self) -> float:
        """One client's step with all it needs."""
        return self.client_bytes + self.token_bytes * self.tokens

    def block(self, free: float, device: str) -> int:
        """Clients that fit into so many free bytes and are worth it; at least one.

        >>> ClientMemory(token_bytes=1e6, client_bytes=1e7, tokens=100).block(8e9, "cpu")
        6
        >>> ClientMemory(token_bytes=1e6, client_bytes=1e7, tokens=100).block(1e9, "cpu")
        4
        """
        fit = int(SHARE[device] * free / max(self.step_bytes, 1))
        return max(1, min(fit, int(ENOUGH_TOKENS[device] / max(self.tokens, 1))))


def device_free_bytes(device: torch.device) -> int:
    """Memory that this process could still take on a device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)


def _saved_bytes(model: CohortModel, trainable: trees.Tree, fixed: trees.Tree, batch: Batch) -> int:
    """What the graph of one client's loss keeps, beside what is there anyway."""
    leaves_C = {name: x.detach().requires_grad_() for name, x in trees.broadcast(trainable, 1).items()}
    cohort = innermost(model)
    there = {x.untyped_storage().data_ptr() for x in (*leaves_C.values(), *fixed.values())}
    if isinstance(cohort, Cohort):
        there |= {x.untyped_storage().data_ptr() for x in cohort.wrapped.model.parameters()}
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in there:
            storages[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # a graph that keeps its own output by a hook is never freed

    with saved_tensors_hooks(keep, lambda x: x), torch.enable_grad():
        model.loss(leaves_C, fixed, batch)
    return sum(storages.values())


def need_of(job: Job, client_task: ClientTask) -> ClientMemory:
    """What a client of this job costs, from the first batch of some of its clients.

    Args:
        job: With its shared tensors where the work wants them.
        client_task: The work and where its batches come from.
    """
    chosen = _spread(job.clients)
    batches = [next(iter(client_task.source.batches([client], job.seed)), None) for client in chosen]
    real_batches = [batch for batch in batches if batch is not None]
    tokens = [max(1, int(tokens_seen_C(batch).sum())) for batch in real_batches] or [1]
    trainable, fixed = job.shared.trainable, job.shared.fixed
    size = trees.nbytes(trainable)
    work: object = innermost(client_task.work)
    wrapped = work is not client_task.work
    if not isinstance(work, Train) or not real_batches:
        return ClientMemory(token_bytes=0.0, client_bytes=2.0 * size, tokens=sum(tokens) / len(tokens))
    widest = max(range(len(real_batches)), key=lambda i: tokens[i])
    batch = real_batches[widest]
    if (
        "answers.prob" not in fixed
    ):  # a wrapping work has them at the node; what is kept of a row does not depend on them
        batch = {name: x for name, x in batch.items() if name != "answer_CB"}
    storages = _saved_bytes(work.model, trainable, fixed, batch)
    copies = 5 + (4 if work.optimizer.name == "adamw" else 2)  # shared, now, new, gradient, change; moments twice
    if wrapped:
        copies += 3  # what a wrapping work makes of the message
    if any(isinstance(layer, PrivateSteps) for layer in layers(client_task.work)):
        # A row's own tensors, their gradient and that in double precision; and two sums in that.
        copies += 4 * int(batch["index_CB"].shape[1]) + 4
    if any(isinstance(layer, PersonalTraining) for layer in layers(client_task.work)):
        copies *= 2  # the clients' own tensors beside the shared ones
    # What gradient steps keep: as it came, as it is now, and as it is sent.
    own = trees.nbytes(GradientChain(work.gradient_steps).own(trees.expand(trainable, 1)))
    return ClientMemory(
        token_bytes=storages / tokens[widest],
        client_bytes=float(copies * size + 3 * own),
        tokens=sum(tokens) / len(tokens),
    )


def _checkpointed(client_task: ClientTask) -> ClientTask | None:
    """The same task whose training computes its layers again on the way back; None where it cannot."""
    train = innermost(client_task.work)
    if not isinstance(train, Train) or not isinstance(train.model, Cohort | PreferenceModel):
        return None
    cohort = innermost(train.model)
    if not isinstance(cohort, Cohort) or not cohort.packed:
        return None
    train = replace(train, model=train.model.checkpointed())
    return replace(client_task, work=with_innermost(client_task.work, train))


def _mark(known: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> dict[str, int]:
    """What was found before, as it was written; earlier versions wrote it without a digest."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known, mark = (found["blocks"], found["sha256"]) if "sha256" in found or "blocks" in found else (found, None)
        if all(type(block) is int for block in known.values()) and mark in (None, _mark(known)):
            return dict(known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise LichenError("is damaged", where=str(file), fix="delete it: the blocks of clients are then found again")


def _spread(clients: Sequence[int]) -> list[int]:
    step = max(1, len(clients) // SAMPLE)
    return list(clients[::step][:SAMPLE])


@final
class AutoBlockSize:
    """Finds the clients side by side for each work once, and remembers it with the run.

    A resumed run goes on with the blocks it began with, on whatever machine, and so gives the bytes
    of one that was not stopped.

    Args:
        file: Where the choices are kept; none: nowhere.
        device: Where clients are trained.
        may_checkpoint: Whether a client that does not fit may have its layers' activations made again.
    """

    def __init__(self, file: Path | None, *, device: str = "cpu", may_checkpoint: bool = True) -> None:
        self.file, self.device, self.may_checkpoint = file, torch.device(device), may_checkpoint
        self.known: dict[str, int] = {}
        self.again: set[str] = set()
        if file is not None and file.exists():
            self.known = _read(file)

    def __call__(self, job: Job, client_task: ClientTask) -> tuple[int, ClientTask]:
        """Clients side by side for this job's work, and the task; a :data:`lichen.core.fold.ClientsPerBlock`."""
        if job.work not in self.known:
            self.known[job.work] = self._measure(job, client_task)
            if self.file is not None:
                write_atomic(self.file, json.dumps({"blocks": self.known, "sha256": _mark(self.known)}).encode())
        again = _checkpointed(client_task) if job.work in self.again else None
        return self.known[job.work], again or client_task

    def _measure(self, job: Job, client_task: ClientTask) -> int:
        need, free = need_of(job, client_task), device_free_bytes(self.device)
        tight = need.step_bytes > SHARE[self.device.type] * free
        again = _checkpointed(client_task) if tight and self.may_checkpoint else None
        if again is not None:
            self.again.add(job.work)
            need = need_of(job, again)
        return need.block(free, self.device.type)
