"""Plans a stream: each period as the run of its own that it is, the scores of all models, and sums that look for drift.

No model of a stream has been trained when it is planned: a period is planned with the model that the first one begins
with. Nothing is rolled back in a plan, and no period drifts: after an alarm fewer rows would be compared.

Legend: N rows, H features of the encoder, D of the kernel, P permutations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch

from lichen.clients.drift.distances import DistanceBins
from lichen.clients.drift.embedding_sums import BANDWIDTH, EmbeddingSums, numbers_of
from lichen.core.contracts.model import Batch
from lichen.core.message import Job, size
from lichen.core.wire.shared import Shared
from lichen.models.arithmetic import arithmetic_of
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.features import encoder_of
from lichen.recipes.assemble.open import LoadedExperiment, fetch_named
from lichen.recipes.assemble.workload import Workload, workload_of
from lichen.recipes.plan.estimate import MODELS, Cost
from lichen.recipes.plan.workload import WorkItem, evaluated
from lichen.recipes.rows.periods import clients_of, only_period
from lichen.recipes.rows.prepare import gather_periods
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.streams.drift import compare_features
from lichen.recipes.tasks.streams.required import require_adapter, require_names

__all__ = ["drift_costs", "periods_ahead", "stream_notes"]

BATCHES = 4
"""Batches on which the frozen model is timed."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """A period that is planned.

    Attributes:
        name: Its name.
        recipe: The run of its own.
        scored: Models that are scored on its test rows.
        judged: Models that are held against each other on its validation rows.
        own: Training rows by client, without those of the past, which stand behind them.
        rows: The same as the model reads them, filled by :meth:`work`.
        seen: What the frozen model reads of them, so too.
        batches: Some of them, so too.
    """

    name: str
    recipe: Recipe
    scored: int
    judged: int
    own: Mapping[str, int]
    rows: dict[str, int] = field(default_factory=dict)
    seen: list[Workload] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def work(self, loaded: LoadedExperiment) -> Mapping[str, tuple[WorkItem, ...]]:
        """What scoring takes, beside the run; and note the rows of the period, opened."""
        experiment = loaded.experiment
        everyone = range(len(experiment.clients.train))
        own = [
            shard.between(0, min(shard.size, self.own[one.name])) if shard.size == len(one.train) else shard
            for one, shard in zip(loaded.clients_data, experiment.clients.train, strict=True)
        ]
        self.rows.update({one.name: shard.size for one, shard in zip(loaded.clients_data, own, strict=True)})
        source = experiment.evaluating(own)

        def plain() -> Iterator[Batch]:
            for client in everyone:
                for batch in source.batches((client,), 0):
                    yield {name: x for name, x in batch.items() if not name.startswith("second_")}

        self.seen.append(sum((workload_of(batch) for batch in plain()), Workload()))
        self.batches.extend(islice(plain(), BATCHES))
        test, valid = (
            evaluated(experiment.evaluating(part), everyone)
            for part in (experiment.clients.test, experiment.clients.valid)
        )
        load = test.times(self.scored) + valid.times(self.judged)
        return {MODELS: (WorkItem(kind="score", workload=load, clients=len(everyone) * (self.scored + self.judged)),)}


def periods_ahead(recipe: Recipe, say: Callable[[str], None]) -> list[Ahead]:
    """The periods in which somebody has rows, the earliest first.

    Args:
        recipe: Of a stream.
        say: Called with lines of progress.

    Raises:
        LichenError: as the run, for rows that make no periods.
    """
    stream = recipe.stream
    assert stream is not None
    require_adapter(recipe)
    fetch_named(recipe, say)
    gathered, _ = gather_periods(recipe)
    clients = {name: clients_of(recipe, one.records) for name, one in gathered.items()}
    there = {name: split.clients_data for name, split in clients.items() if split is not None}
    require_names(recipe, tuple(there))
    base, found = str(recipe.model.name), list[Ahead]()
    for place, (name, some) in enumerate(there.items()):
        base = stream.rebase.model if stream.rebase is not None and stream.rebase.period == name else base
        own = only_period(recipe, name, **({} if place else {"replay": 0.0, "replay_share": 0.5}))
        judged = 2 if stream.react == "roll-back" else 0
        rows = {one.name: len(one.train) for one in some}
        found.append(Ahead(name=name, recipe=on_base(own, base), scored=len(there) + 1, judged=judged, own=rows))
    return found


def stream_notes(recipe: Recipe) -> tuple[str, ...]:
    """How far the numbers of a stream reach."""
    stream = recipe.stream
    assert stream is not None
    notes = ["a period is planned as if all before it were accepted; loading is counted once for each period's run"]
    if stream.detect == "mmd":
        notes.append("sums that look for drift are those without an alarm, after which fewer rows are compared")
    elif stream.detect != "none":
        notes.append("what clients take to watch their losses comes on top of all numbers")
    if stream.rebase is not None and stream.rebase.how == "distil":
        notes.append("the answers of the old model, and learning them at the server, come on top of all numbers")
    return tuple(notes)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DriftCost:
    """What it takes to look for drift before a period.

    Attributes:
        cost: Of the frozen model's pass over the period's rows, and of the sums.
        clients: Who sends sums; 0 before the first period.
        client_up: Bytes of one of them.
    """

    cost: Cost
    clients: int
    client_up: int

    def as_dict(self) -> dict[str, int]:
        """As JSON holds it."""
        return {"clients": self.clients, "client_up": self.client_up, "up": self.clients * self.client_up}


def drift_costs(recipe: Recipe, ahead: list[Ahead], folder: Path, say: Callable[[str], None]) -> dict[str, DriftCost]:
    """What ``stream.detect: mmd`` takes, by period; nothing where it is not used.

    Args:
        recipe: Of the stream.
        ahead: Its periods, of which all have been planned.
        folder: For what is written; the caller removes it.
        say: Called with lines of progress.
    """
    if recipe.stream is None or recipe.stream.detect != "mmd":
        return {}
    say("timing what looks for drift")
    features, _ = encoder_of(recipe, str(recipe.model.name), exact=recipe.model.device == "cpu")
    flops, width = arithmetic_of(features.model, {}), features.width
    sample = ahead[-1].batches
    features(sample[0])
    begun = time.perf_counter()
    for batch in sample:
        features(batch)
    unit = (time.perf_counter() - begun) / max(1.0, sum((workload_of(batch) for batch in sample), Workload()).units)
    sums = EmbeddingSums(numbers_of, width=width)
    up = _client_up(sums)
    each = _row_seconds(ahead, width, folder)
    found, rows, names = dict[str, DriftCost](), 0, set[str]()
    for place, period in enumerate(ahead):
        load, rows, names = period.seen[0], rows + sum(period.rows.values()), names | set(period.rows)
        compared = rows if place else 0
        # φ of each row, and its share in each permutation's sum.
        operations = 2.0 * compared * sums.dimension * (width + sums.permutations + 1)
        cost = Cost(
            seconds=unit * load.units + each * compared,
            evaluate_tokens=load.units,
            evaluate_flops=flops.forward(Workload(rows=load.rows, tokens=load.tokens, square=load.square)) + operations,
        )
        found[period.name] = DriftCost(cost=cost, clients=len(names) if place else 0, client_up=up)
    return found


def _client_up(sums: EmbeddingSums) -> int:
    """Bytes of a client's counts of distances, and of its sums."""
    job = Job(work="drift", shared=Shared(), version=0, clients=(0,), seed=0, settings={BANDWIDTH: 1.0})
    works: tuple[Any, ...] = (sums, DistanceBins(numbers_of))
    return sum(size(work.final(work.init(job, (0,), None))[0]) for work in works)


def _row_seconds(ahead: list[Ahead], width: int, folder: Path) -> float:
    """Seconds that a row takes in the sums, as measured on drawn features of all periods."""
    if len(ahead) == 1:
        return 0.0
    g = torch.Generator().manual_seed(0)
    trees = [{name: torch.randn(rows, width, generator=g) for name, rows in one.rows.items()} for one in ahead]
    begun = time.perf_counter()
    compare_features(trees[:-1], trees[-1], seed=0, folder=folder)
    return (time.perf_counter() - begun) / max(1, sum(sum(one.rows.values()) for one in ahead))
