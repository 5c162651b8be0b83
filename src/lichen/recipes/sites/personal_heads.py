"""Asks clients of task ``oneshot`` for heads of their own: solved, chosen on validation rows, scored on test rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lichen.algorithms.scores import require_everyone, score_everyone
from lichen.clients.personal.ridge import BestHead, PersonalHeads
from lichen.clients.statistics.closed_head import HeadConfusion
from lichen.clients.statistics.sufficient import Statistics
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.client import ClientTask, ClientWork
from lichen.core.contracts.engine import Engine
from lichen.core.contracts.model import Batch
from lichen.core.message import Job
from lichen.core.roster import PARTS
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, EvalSource
from lichen.engines.local import LocalEngine
from lichen.recipes.assemble.column import over_ranks
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.limits import counting
from lichen.recipes.schema.recipe import Recipe
from lichen.server.sums.fixed_point import read_sums

__all__ = ["ask_for_heads", "heads_here", "personal_heads", "sums_down"]

VERSION = 2
"""Of the first of these jobs: heads of clients alone have had the versions before."""


def personal_heads(
    recipe: Recipe, statistics: Statistics, features: Callable[[Batch], Tensor], classes: int
) -> dict[str, ClientWork]:
    """The works by name, where the recipe has heads of the clients' own.

    Args:
        recipe: The recipe.
        statistics: Sums of a client's rows.
        features: Frozen features of a batch.
        classes: K.
    """
    config = recipe.personal
    if config is None:
        return {}
    return {
        "personal": PersonalHeads(statistics, lam=recipe.ridge, weights=config.weight),
        "personal.valid": BestHead(features, classes=classes, weights=config.weight),
        "personal.test": HeadConfusion(features, classes=classes, personal=True),
    }


def sums_down(total: Any) -> Tree:
    """What goes down to clients: the sums of all clients' statistics, float64."""
    sums = read_sums(total)
    return {name: sums[name] for name in ("G", "H")}


def ask_for_heads(engine: Engine, job: Job, sums: Tree, counts: Callable[[str, str], Admission]) -> Job:
    """Let each client solve for its heads and keep the best; the job by which they are then scored.

    Args:
        engine: Reaches the clients.
        job: Of any work, for all clients.
        sums: From :func:`sums_down`.
        counts: What counts of the answers of a work about a part of the rows.

    Raises:
        LichenError: if a client could not, or was not there.
    """
    solving = replace(job, work="personal", shared=Shared(sums), version=VERSION)
    choosing = replace(job, work="personal.valid", shared=Shared(), version=VERSION + 1)
    for one, part in ((solving, "train"), (choosing, "valid")):
        require_everyone(collect(engine, [one], admission=counts(one.work, part)).attendance, one, "head of its own")
    return replace(choosing, work="personal.test", version=VERSION + 2)


def heads_here(
    recipe: Recipe,
    rows: Mapping[str, Sequence[ArrayShard]],
    total: Any,
    classes: int,
    folder: RunFolder,
    base: str,
) -> Tree:
    """The same where this process has all rows: everybody's ``confusion`` ``(N, K, K)``, and the ``bytes_down``.

    Args:
        recipe: The recipe.
        rows: Features by part of the rows and client.
        total: The sum of everybody's statistics.
        classes: K.
        folder: The run folder.
        base: Digest of the encoder.
    """

    def features(batch: Batch) -> Tensor:
        return batch["x_CBF"]

    statistics = Statistics(features, classes=classes, width=rows["train"][0].x.shape[-1])
    works = personal_heads(recipe, statistics, features, classes)
    parts = dict(zip(works, PARTS, strict=True))
    tasks = {
        name: ClientTask(work=work, source=EvalSource(rows[parts[name]], batch_size=256, pad=0))
        for name, work in works.items()
    }
    store = ClientStore(folder.clients("personal", "ridge"))
    engine = over_ranks(folder.ranks, LocalEngine(tasks, store, base=base, block_size=64))

    def counts(work: str, part: str) -> Admission:
        return counting(work, works[work], [shard.size for shard in rows[part]])

    everyone = tuple(range(len(rows["train"])))
    job = Job(work="personal", shared=Shared(), version=0, clients=everyone, seed=0, base=base)
    scoring = ask_for_heads(engine, job, sums_down(total), counts)
    down = torch.tensor(engine.bytes_down, dtype=torch.float64)
    scores = score_everyone(engine, scoring, counts(scoring.work, "test"))[1]
    return {"confusion": scores["confusion"], "bytes_down": down}
