"""Plans tasks ``chat`` and ``classify``: times a few batches and multiplies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lichen.allocator import keeps_large_buffers
from lichen.data.sources.records import load_records
from lichen.models.adapters.quantized import resident_bytes, weights_of
from lichen.recipes.assemble.capacity import rooms
from lichen.recipes.assemble.experiment import Experiment, grid_name
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe, shards_of
from lichen.recipes.assemble.parts import client_tasks
from lichen.recipes.assemble.workload import heavy, pooled_experiment
from lichen.recipes.plan.estimate import Cost, Expected, Memory, disk_of
from lichen.recipes.plan.flops import Flops, arithmetic_of, counted
from lichen.recipes.plan.memory import Gauge
from lichen.recipes.plan.probe import Probe
from lichen.recipes.plan.synthetic import with_writing
from lichen.recipes.plan.timing import Rate
from lichen.recipes.plan.traffic import traffic
from lichen.recipes.plan.workload import Chunk, Kind, budget, evaluated, invitations
from lichen.recipes.rows.prepare import encode
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.coverage import planned

__all__ = ["expect", "expect_adapt"]

Chunks = Mapping[str, tuple[Chunk, ...]]


LARGE = 128 * 1024
"""Bytes of a tensor above which the C library maps new memory for each copy, unless it is told to keep it."""

KEPT = (
    "seconds are those of the command line, which keeps large buffers; a program that calls lichen.run takes longer, "
    "up to several times, unless it calls lichen.allocator.keep_large_buffers() first"
)
GIVEN_BACK = (
    "seconds are those of this program, which gives large buffers back; the command line keeps them and takes less, "
    "as does a program that calls lichen.allocator.keep_large_buffers() first"
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """Rates, one client's bytes up after training and after validation, memory, and private bytes by column and own."""

    rates: Mapping[Kind, Rate]
    train_up: int
    score_up: int
    memory: Memory
    private: Mapping[str, int]
    own: int


def expect_adapt(recipe: Recipe, folder: Path, gauge: Gauge, say: Callable[[str], None], seconds: float) -> Expected:
    """Open the recipe as a run does, then :func:`expect`.

    Args:
        recipe: Of task chat or classify.
        folder: For what is written; the caller removes it.
        gauge: The device's memory.
        say: Called with lines of progress.
        seconds: About how long each kind of work is timed.
    """
    began = time.perf_counter()
    loaded = open_recipe(recipe, say=say, keep_private=False, tell_read=True)
    start = time.perf_counter() - began
    weights = weights_of(loaded.foundation) if loaded.foundation is not None else {}
    base = resident_bytes(loaded.foundation) if weights else 0
    chunks: Chunks = budget(loaded.experiment, invitations(loaded.experiment))
    if recipe.writes:
        chunks = _with_extras(loaded, chunks)
    tensors = loaded.experiment.start

    def flops() -> Flops:
        return arithmetic_of(loaded.foundation, tensors) if weights else flops_of(loaded.experiment)

    found = expect(loaded.experiment, chunks, flops, folder, gauge, say, seconds, base=base)
    # Every spawned engine loads for itself, one for each learning rate.
    starts = 1 + len(recipe.optimizer.lr) if recipe.engine.name == "spawned" else 1
    frozen = sum(count for name, count in weights.items() if name not in tensors)
    return with_writing(replace(found, start=start * starts, frozen=frozen, read=loaded.read), loaded, folder, say)


def flops_of(experiment: Experiment) -> Flops:
    """Operations of a small model, counted on one real step."""
    source = client_tasks(experiment)[f"train {grid_name(experiment.recipe.optimizer.lr[0])}"].source
    return counted(experiment.model, experiment.start, next(iter(source.batches((0,), 0))))


def _with_extras(loaded: LoadedExperiment, chunks: Chunks) -> Chunks:
    """The bare model in other forms, and the text that may be forgotten, twice."""
    experiment, recipe, extra = loaded.experiment, loaded.experiment.recipe, list[Chunk]()
    if "base" in chunks:
        for form in dict.fromkeys(recipe.compare.forms):
            if form != recipe.data.form:
                make = encode(recipe, loaded.tokenizer, (), form=form, keep_private=False)
                shards = shards_of(loaded.clients_data, "test", make)
                load = evaluated(experiment.evaluating(shards), range(len(shards)))
                extra.append(Chunk(kind="score", load=load, clients=len(shards)))
    chunks = {**chunks, "base": (*chunks["base"], *extra)} if extra else chunks
    if recipe.compare.retention_text:
        records = load_records(recipe.compare.retention_text, columns={})
        step = max(1, len(records) // recipe.compare.retention_rows)
        make = encode(recipe, loaded.tokenizer, (), form="plain", keep_private=False)
        shard = make(records[::step][: recipe.compare.retention_rows])
        load = evaluated(experiment.evaluating([shard]), (0,)).times(2)
        chunks = {**chunks, "forgotten": (Chunk(kind="score", load=load, clients=2),)}
    return chunks


def expect(
    experiment: Experiment,
    chunks: Chunks,
    flops: Callable[[], Flops],
    folder: Path,
    gauge: Gauge,
    say: Callable[[str], None],
    seconds: float,
    *,
    base: int = 0,
) -> Expected:
    """Measure a bench's works and multiply by its budget; ``start`` and ``frozen`` are left at 0.

    Args:
        experiment: The recipe's.
        chunks: What every column will train and evaluate.
        flops: Operations of a load; asked for last, because counting them needs memory that a run does not.
        folder: For what is written; the caller removes it.
        gauge: The device's memory.
        say: Called with lines of progress.
        seconds: About how long each kind of work is timed.
        base: Bytes of the frozen model.
    """
    invited, engine = invitations(experiment), experiment.recipe.engine
    say("timing a few blocks")
    found = _measure(experiment, folder, gauge, seconds, max(1, *map(len, invited)), base, tuple(chunks))
    ranks = engine.nodes if engine.name not in ("local", "spawned") else 1
    operations = flops()
    sent = traffic(experiment, invited, train_up=found.train_up, score_up=found.score_up)
    notes = []
    if ranks > 1:
        notes.append(f"seconds with many clients are one process's divided by {ranks} ranks, which is an estimate")
    if engine.name == "spawned":
        notes.append(f"seconds of {engine.nodes} nodes are those of one process, which is an estimate")
    if experiment.recipe.federation.patience is not None:
        notes.append("federation.patience may end a column before its last round: all numbers are the most it takes")
    if max((x.nbytes for x in experiment.start.values()), default=0) >= LARGE:
        notes.append(KEPT if keeps_large_buffers() else GIVEN_BACK)
    if sent.bound:
        notes.append(
            f"bytes down are a bound: the patch of {experiment.recipe.rule} grows by as much as clients differ"
        )
    return Expected(
        clients=len(experiment.train),
        trained=sum(x.numel() for name, x in experiment.start.items() if not name.startswith("answers.")),
        frozen=0,
        bytes=sent,
        memory=replace(found.memory, copies={"local": 0, "spawned": engine.nodes}.get(engine.name, ranks - 1)),
        disk=disk_of(experiment, found.private, tuple(chunks), own=found.own, invited=invited),
        columns={name: _cost(parts, found.rates, operations, ranks) for name, parts in chunks.items()},
        start=0.0,
        notes=tuple(notes),
        seen=planned(experiment, invited, tuple(chunks)),
        rooms=rooms(experiment, client_tasks(experiment)[f"train {grid_name(experiment.recipe.optimizer.lr[0])}"]),
    )


def _cost(parts: Sequence[Chunk], rates: Mapping[Kind, Rate], flops: Flops, ranks: int) -> Cost:
    training = [part for part in parts if part.kind in ("train", "alone", "pooled")]
    scoring = [part for part in parts if part not in training]
    return Cost(
        seconds=sum(
            rates[p.kind].seconds(p.load, p.clients) / (1 if p.kind.startswith("pooled") else ranks) for p in parts
        ),
        train_tokens=sum(part.load.units for part in training),
        evaluate_tokens=sum(part.load.units for part in scoring),
        train_flops=sum(flops.train(part.load) for part in training),
        evaluate_flops=sum(flops.forward(part.load) for part in scoring),
    )


def _measure(
    experiment: Experiment, folder: Path, gauge: Gauge, seconds: float, invited: int, base: int, columns: Sequence[str]
) -> _Measured:
    probe = Probe(experiment, folder, gauge, seconds=seconds)
    source = client_tasks(experiment)[f"train {grid_name(experiment.recipe.optimizer.lr[0])}"].source
    loaded, there = gauge.now(), gauge.available()
    everyone = tuple(range(len(experiment.train)))
    together = probe.block("train", everyone[:invited])
    most = max(together, probe.block("alone", everyone) if "alone" in columns else 0)
    clients = heavy(source, everyone, most)
    gauge.restart()
    first = probe.train(clients[:1], steps=1)
    each = max(1, gauge.since() - loaded)
    # What a block needs is known roughly by now: one that will not fit is told of, not tried.
    safe = max(1, min(most, math.floor((there - loaded) / each)))
    gauge.restart()
    tried = clients[: min(safe, together)]
    training = probe.trained(tried)
    # A larger block is told from this one: its clients are side by side, and each adds as much.
    each = max(1, math.ceil((gauge.since() - loaded) / len(tried) * probe.luck(tried, training)))
    block = each * most
    rates: dict[Kind, Rate] = {"train": Rate.of(training)}
    guess = rates["train"].unit / 2
    scoring = probe.scored(guess)
    rates["score"] = Rate.of(scoring)
    private: dict[str, int] = {}
    if "alone" in columns:
        alone = probe.private(clients[:safe], rates, "alone")
        rates, private["alone"] = {**rates, **alone.rates}, alone.bytes
    block = max(block, gauge.since() - loaded)
    if "pooled" in columns:
        # What the C library has kept is of little use to batches of another size: it stays beside theirs.
        kept = max(0, gauge.now() - loaded)
        gauge.restart()
        joined = Probe(pooled_experiment(experiment), folder, gauge, seconds=seconds).private((0,), rates, "pooled")
        rates, private["pooled"] = {**rates, **joined.rates}, joined.bytes
        block = max(block, kept + gauge.since() - loaded)
    memory = Memory(
        base=base,
        loaded=loaded,
        client=each,
        block=block,
        clients=most,
        peak=max(gauge.peak(), loaded + block),
        available=there,
    )
    return _Measured(
        rates=rates, train_up=first.up, score_up=scoring.up, memory=memory, private=private, own=probe.own()
    )
