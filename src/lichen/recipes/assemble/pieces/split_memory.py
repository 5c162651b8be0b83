"""What a split model takes of a client's memory and of its server's, and cuts that follow from ``federation.memory``.

Measured: one client's steps are done with every tensor counted, the client's by itself and the server's by itself.
Where the recipe says what memory clients have, each holds the most first blocks of those that ``split.client.first``
names with which it fits. What is counted are tensors of training; the interpreter and its libraries come on top.

Legend: C = 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from lichen.clients.splitting.ends import Cut
from lichen.clients.splitting.split_parts import SplitParts
from lichen.clients.splitting.split_train import SplitTrain
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.wire.shared import Shared
from lichen.engines.splitting.middle import Middle
from lichen.models.cohort import Cohort
from lichen.models.pieces.piece_cohort import PieceCohort
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.live_bytes import LiveBytes
from lichen.recipes.assemble.workload import largest_batch

__all__ = ["SplitMemory", "cut_tiers", "fitting_parts", "split_job", "split_memory", "unsplit"]

GIB = 1 << 30


def unsplit(experiment: Experiment) -> Experiment:
    """The same with clients that hold the whole model, whatever memory they have; itself where it is not split."""
    recipe = experiment.recipe
    if recipe.split is None:
        return experiment
    federation = recipe.federation.model_copy(update={"memory": None})
    recipe = recipe.model_copy(update={"split": None, "federation": federation})
    return experiment.with_server(recipe=recipe, split=None)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitMemory:
    """Bytes of both sides.

    Attributes:
        client_frozen: The frozen weights of a client's two ends.
        client_training: The most tensors that it holds besides.
        server_frozen: The frozen weights of the middle.
        server_training: What the server holds besides, for each client at work.
        whole_frozen: The frozen weights of the whole model.
    """

    client_frozen: int
    client_training: int
    server_frozen: int
    server_training: int
    whole_frozen: int


def _frozen(*parts: object) -> int:
    """Bytes of the frozen weights of some pieces, each storage once."""
    cohorts = [part for part in parts if isinstance(part, PieceCohort | Cohort)]
    each = [x.untyped_storage() for cohort in cohorts for x in cohort.wrapped.frozen().values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in each}.values())


def split_memory(
    experiment: Experiment,
    task: ClientTask,
    client: int,
    *,
    cut: Cut | None = None,
    batches: Iterable[Batch] | None = None,
) -> SplitMemory:
    """The memory of one client and of the server for it, measured over some steps of training.

    Args:
        experiment: Of a recipe that is split.
        task: What its clients do in a round.
        client: Whose rows.
        cut: What it holds; None: what the recipe gives it.
        batches: One a step; None: those of a round.
    """
    split, recipe = experiment.server.split, experiment.recipe
    work = task.work
    assert split is not None
    assert isinstance(work, SplitTrain)
    shared, cut = experiment.start, cut or split.cut_of(client)
    seed = derive(recipe.seed, "footprint")
    job = Job(work="", shared=shared, version=0, clients=(client,), seed=seed, settings={"lr_scale": 1.0})
    piece = split.middles[cut]
    middle = Middle(piece=piece, train=work.train, form=work.form, clip=work.clip)
    mine, theirs = split_job(job, middle.names)
    own, server = LiveBytes(), LiveBytes()
    with server:
        half = middle.start(theirs, mine, client)
    rows = task.source.batches((client,), job.seed) if batches is None else batches
    talk = replace(work, ends=lambda _: split.ends[cut]).talk(mine, (client,), None, rows)
    with own:
        question = next(talk)
    try:
        while True:
            with server:
                received = {name: x.clone() for name, x in question.tensors.items()}
                half, answer = middle.answer(half, received, back=not work.local_head)
                del received
            del question
            with own:
                question = talk.send({name: x.clone() for name, x in answer.items()})
    except StopIteration:
        pass
    return SplitMemory(
        client_frozen=_frozen(split.ends[cut].first, split.ends[cut].last),
        client_training=mine.shared.nbytes + own.peak,
        server_frozen=_frozen(piece),
        server_training=theirs.shared.nbytes + server.peak,
        whole_frozen=_frozen(split.ends[cut].first, piece, split.ends[cut].last),
    )


def split_job(job: Job, middle: frozenset[str]) -> tuple[Job, Job]:
    """The client's part of a job, and the middle's."""
    ends = {name: x for name, x in job.shared.trainable.items() if name not in middle}
    inside = {name: x for name, x in job.shared.trainable.items() if name in middle}
    return replace(job, shared=Shared(ends)), replace(job, shared=Shared(inside))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CutTier:
    """What clients of one memory hold.

    Attributes:
        memory: GiB.
        clients: How many have it, and this cut.
        cut: Blocks at both ends.
        needed: Bytes that takes, at most.
    """

    memory: float
    clients: int
    cut: Cut
    needed: int


def fitting_parts(experiment: Experiment, task: ClientTask) -> SplitParts | None:
    """The pieces, where the recipe says what memory clients have with the largest cut that each can hold.

    Raises:
        LichenError: if some client fits none; it is named.
    """
    split, memory = experiment.server.split, experiment.recipe.federation.memory
    if split is None or not memory:
        return split
    needed = _needed(experiment, task)
    return replace(split, cuts=tuple(cut for _, cut in _fitting(experiment, needed)))


def cut_tiers(experiment: Experiment, task: ClientTask) -> tuple[CutTier, ...]:
    """What clients of each memory hold, the smallest first; nothing without ``federation.memory``.

    Raises:
        LichenError: as :func:`fitting_parts`.
    """
    if experiment.server.split is None or not experiment.recipe.federation.memory:
        return ()
    needed, count = _needed(experiment, task), len(experiment.server.roster)
    each = _fitting(experiment, needed)
    having = Counter(each[client % len(each)] for client in range(count))
    return tuple(
        CutTier(memory=gib, clients=clients, cut=cut, needed=needed[cut])
        for (gib, cut), clients in sorted(having.items(), key=lambda pair: (pair[0][0], pair[0][1].first))
    )


def _needed(experiment: Experiment, task: ClientTask) -> dict[Cut, int]:
    """Bytes that a client holds, by cut: two steps over the largest batch, and all its rows where changes are sent."""
    split = experiment.server.split
    assert split is not None
    assert isinstance(task.work, SplitTrain)
    form, (client, batch) = task.work.form, largest_batch(task, len(experiment.clients.train))
    remembered = 2 * 4 * form.numbered * form.most * form.width if form.remembers else 0
    found = dict[Cut, int]()
    for cut in split.ends:
        one = split_memory(experiment, task, client, cut=cut, batches=[batch, batch])
        found[cut] = one.client_frozen + one.client_training + remembered
    return found


def _fitting(experiment: Experiment, needed: Mapping[Cut, int]) -> list[tuple[float, Cut]]:
    """``(GiB, cut)`` dealt out to clients in turns."""
    recipe, roster = experiment.recipe, experiment.server.roster
    memory = recipe.federation.memory
    assert recipe.split is not None
    assert memory
    last, found = recipe.split.client.last, list[tuple[float, Cut]]()
    for client in range(min(math.lcm(len(memory), len(last)), len(roster))):
        gib, behind = memory[client % len(memory)], last[client % len(last)]
        mine = sorted((cut for cut in needed if cut.last == behind), key=lambda cut: cut.first)
        able = [cut for cut in mine if needed[cut] <= gib * GIB]
        if not able:
            least = needed[mine[0]] / GIB
            raise LichenError(
                f"{gib:.3g} GiB of {roster[client].name} hold no client: the embeddings, {mine[0].first} and {behind} "
                f"blocks and what training them takes need {least:.3g} GiB",
                where="federation.memory",
                fix=f"give at least {math.ceil(100 * least) / 100:g}, or let split.client begin with fewer blocks",
            )
        found.append((gib, able[-1]))
    return found
