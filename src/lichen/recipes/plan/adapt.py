"""Plans tasks ``chat`` and ``classify``: times a few batches and multiplies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from lichen.allocator import keeps_large_buffers
from lichen.core.message import Job
from lichen.data.sources.records import load_records
from lichen.models.adapters.quantized import resident_bytes, weights_of
from lichen.models.arithmetic import arithmetic_of
from lichen.present.units import seconds_text
from lichen.recipes.assemble.capacity import device_tiers
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe, shards_of
from lichen.recipes.assemble.parts import client_tasks, initial_shared, works_of
from lichen.recipes.assemble.pieces.split_memory import unsplit
from lichen.recipes.assemble.preference.references import without_references
from lichen.recipes.assemble.sides.masks import without_masks
from lichen.recipes.assemble.sides.personal import stages_of
from lichen.recipes.assemble.sides.privacy import for_timing
from lichen.recipes.assemble.sides.stated_privacy import promised
from lichen.recipes.assemble.workload import heaviest, pooled_experiment
from lichen.recipes.plan.estimate import MODELS, Cost, Estimate, Memory, disk_of
from lichen.recipes.plan.flops import Flops, counted
from lichen.recipes.plan.masks import masked_rounds
from lichen.recipes.plan.memory import MemoryMeter
from lichen.recipes.plan.pieces.split_costs import split_costs
from lichen.recipes.plan.preference import ANSWERS as OWN_ANSWERS
from lichen.recipes.plan.preference import NOTE, ONCE, once, once_bytes
from lichen.recipes.plan.profiler import Profiler
from lichen.recipes.plan.synthetic import with_writing
from lichen.recipes.plan.timing import Rate
from lichen.recipes.plan.traffic import traffic
from lichen.recipes.plan.workload import Kind, WorkItem, budget, evaluated, evaluations, invitations
from lichen.recipes.proxy.columns import refuse_proxy
from lichen.recipes.rows.prepare import encode
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.coverage import planned
from lichen.transforms.transform import Transformed

__all__ = ["estimate_adapt", "estimate_columns"]

WorkItems = Mapping[str, tuple[WorkItem, ...]]


LARGE = 128 * 1024
"""Bytes of a tensor above which the C library maps new memory for each copy, unless it is told to keep it."""

RETAINED = (
    "seconds are those of the command line, which keeps large buffers; a program that calls lichen.run takes longer, "
    "up to several times, unless it calls lichen.allocator.keep_large_buffers() first"
)
GIVEN_BACK = (
    "seconds are those of this program, which gives large buffers back; the command line keeps them and takes less, "
    "as does a program that calls lichen.allocator.keep_large_buffers() first"
)

PROXY = "scoring {name} by itself and steered, and its weights, come on top of all numbers"
ANSWERS = (
    "answers to compare.requests, on which refusals are counted, and the server's repair come on top of all numbers"
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


def estimate_adapt(
    recipe: Recipe,
    folder: Path,
    meter: MemoryMeter,
    say: Callable[[str], None],
    seconds: float,
    *,
    extra: Callable[[LoadedExperiment], WorkItems] = lambda _: {},
) -> Estimate:
    """Open the recipe as a run does, then :func:`estimate_columns`.

    Args:
        recipe: Of task chat or classify.
        folder: For what is written; the caller removes it.
        meter: The device's memory.
        say: Called with lines of progress.
        seconds: About how long each kind of work is timed.
        extra: What is scored beside the run, as columns of their own.
    """
    start_time = time.perf_counter()
    loaded = open_recipe(recipe, say=say, keep_private=False, report_counts=True)
    refuse_proxy(loaded, say)
    loaded = replace(loaded, experiment=without_references(loaded.experiment))
    start = time.perf_counter() - start_time
    weights = weights_of(loaded.foundation) if loaded.foundation is not None else {}
    base = resident_bytes(loaded.foundation) if weights else 0
    invited = invitations(loaded.experiment)
    work_items: WorkItems = budget(loaded.experiment, invited)
    if recipe.writes:
        work_items = _with_extras(loaded, work_items)
    prepared = once(loaded.experiment, invited, tuple(work_items))
    retained = once_bytes(loaded.experiment, invited, tuple(work_items))
    work_items = {**{name: (item,) for name, item in prepared.items()}, **work_items, **extra(loaded)}
    tensors = loaded.experiment.start

    def flops() -> Flops:
        return arithmetic_of(loaded.foundation, tensors.trainable) if weights else flops_of(loaded.experiment)

    found = estimate_columns(loaded.experiment, work_items, flops, folder, meter, say, seconds, base=base)
    # Every spawned engine loads for itself, one for each learning rate.
    starts = 1 + len(recipe.optimizer.lr) if recipe.engine_kind.nodes else 1
    frozen = sum(count for name, count in weights.items() if name not in tensors.trainable)
    notes = found.notes if not recipe.writes or recipe.unsafe_requests is None else (*found.notes, ANSWERS)
    notes = notes if recipe.compare.proxy is None else (*notes, PROXY.format(name=recipe.compare.proxy))
    notes = (*notes, NOTE) if OWN_ANSWERS in work_items else notes
    disk = replace(found.disk, private=found.disk.private + retained)
    found = replace(found, start=start * starts, frozen=frozen, read=loaded.read, notes=notes, disk=disk)
    return with_writing(found, loaded, folder, say)


def flops_of(experiment: Experiment) -> Flops:
    """Operations of a small model, counted on one real step."""
    source = client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"].source
    return counted(experiment.model, experiment.start, next(iter(source.batches((0,), 0))))


def _with_extras(loaded: LoadedExperiment, work_items: WorkItems) -> WorkItems:
    """The bare model in other forms, and the text that may be forgotten, twice."""
    experiment, recipe, extra = loaded.experiment, loaded.experiment.recipe, list[WorkItem]()
    if "base" in work_items:
        forms = tuple(dict.fromkeys((recipe.data.form, *recipe.compare.forms)))
        for form in forms if len(forms) > 1 else ():
            make, own = encode(recipe, loaded.tokenizer, (), form=form, keep_private=False), form == recipe.data.form
            for part in ("valid",) if own else ("valid", "test"):
                shards = experiment.clients.valid if own else shards_of(loaded.clients_data, part, make)
                workload = evaluated(experiment.evaluating(shards), range(len(shards)))
                extra.append(WorkItem(kind="score", workload=workload, clients=len(shards)))
    work_items = {**work_items, "base": (*work_items["base"], *extra)} if extra else work_items
    if recipe.compare.retention_text:
        records = load_records(recipe.compare.retention_text, columns={})
        step = max(1, len(records) // recipe.compare.retention_rows)
        make = encode(recipe, loaded.tokenizer, (), form="plain", keep_private=False)
        shard = make(records[::step][: recipe.compare.retention_rows])
        workload = evaluated(experiment.evaluating([shard]), (0,)).times(2)
        work_items = {**work_items, "forgotten": (WorkItem(kind="score", workload=workload, clients=2),)}
    return work_items


def estimate_columns(
    experiment: Experiment,
    work_items: WorkItems,
    flops: Callable[[], Flops],
    folder: Path,
    meter: MemoryMeter,
    say: Callable[[str], None],
    seconds: float,
    *,
    base: int = 0,
) -> Estimate:
    """Measure an experiment's works and multiply by its budget; ``start`` and ``frozen`` are left at 0.

    Args:
        experiment: The recipe's.
        work_items: What every column will train and evaluate.
        flops: Operations of a load; asked for last, because counting them needs memory that a run does not.
        folder: For what is written; the caller removes it.
        meter: The device's memory.
        say: Called with lines of progress.
        seconds: About how long each kind of work is timed.
        base: Bytes of the frozen model.
    """
    invited, engine, whole = invitations(experiment), experiment.recipe.engine, experiment
    experiment = unsplit(experiment.with_server(recipe=without_masks(experiment.recipe)))
    found = _measure(experiment, folder, meter, say, seconds, max(1, *map(len, invited)), base, tuple(work_items))
    kind = experiment.recipe.engine_kind
    ranks = engine.nodes if kind.ranks else 1
    say("counting operations")
    operations = flops()
    rounds = tuple(name for name in work_items if name not in (*ONCE, MODELS))
    sent = traffic(experiment, invited, train_up=found.train_up, score_up=found.score_up)
    columns = {name: _cost(parts, found.rates, operations, ranks) for name, parts in work_items.items()}
    notes, memory = list[str](), found.memory
    if (masks := masked_rounds(whole, invited, sent, score_up=found.score_up)) is not None:
        cost, sent, memory = columns["federated"], masks.sent, replace(memory, peak=memory.peak + masks.vector_bytes)
        columns["federated"] = replace(cost, seconds=cost.seconds + masks.seconds / ranks + masks.server_seconds)
        notes += masks.notes
    split = split_costs(whole, invited, sent)
    sent, notes = split.sent, [*notes, *split.notes]
    if ranks > 1:
        notes.append(f"seconds with many clients are one process's divided by {ranks} ranks, which is an estimate")
    if kind.nodes:
        notes.append(f"seconds of {engine.nodes} nodes are those of one process, which is an estimate")
    if experiment.recipe.federation.patience is not None:
        notes.append("federation.patience may end a column before its last round: all numbers are the most it takes")
    personal = experiment.recipe.personal
    if personal is not None and (personal.kind in ("ditto", "apfl") or personal.in_turns):
        notes.append("operations of training are those of the shared model; own models beside it take as many again")
    if personal is not None and personal.kind in ("feddpa", "fedalt"):
        again = ", and each row is read once more by the frozen model" if personal.kind == "feddpa" else ""
        notes.append(f"two adapters side by side are counted as one{again}")
    if (judged := evaluations(experiment.recipe, invited, [1] * len(invited))) > 0:
        notes.append(f"values take {judged} evaluations at most, which seconds and bytes hold")
    if "alone_best" in work_items:
        compare = experiment.recipe.compare
        notes.append(
            f"alone_best is at most: {compare.alone_epochs} passes of every client over its rows, if none stops "
            f"after {compare.alone_patience} validations without a gain, as most do"
        )
    if max((x.nbytes for x in experiment.start.flat().values()), default=0) >= LARGE:
        notes.append(RETAINED if keeps_large_buffers() else GIVEN_BACK)
    if sent.bound:
        grows = f"the patch of {experiment.recipe.rule} grows by as much as clients differ"
        named = "a job is called by the rate that is chosen, and their names are of unequal length"
        walks = "a round is valued by at most so many coalitions, and walks end sooner"
        value = experiment.recipe.value
        if experiment.recipe.aggregation.patch is None:
            grows = walks if value is not None and value.kind == "gtg" else named
        notes.append(f"bytes down are a bound: {grows}")
    return Estimate(
        clients=len(experiment.server.roster),
        trained=sum(x.numel() for x in experiment.start.trainable.values()),
        frozen=0,
        bytes=sent,
        memory=replace(memory, copies=engine.nodes if kind.nodes else ranks - 1),
        disk=disk_of(experiment, found.private, rounds, own=found.own, invited=invited, sent=found.train_up),
        columns=columns,
        start=0.0,
        notes=tuple(notes),
        privacy=promised(whole.server, _numbers(experiment)),
        masks=None if masks is None else masks.facts,
        split=split.facts,
        seen=planned(experiment, invited, rounds),
        rooms=device_tiers(experiment, client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"]),
    )


def _numbers(experiment: Experiment) -> int:
    """Numbers of one client's message in the first round, before it is coded."""
    server, lr = experiment.server, experiment.recipe.optimizer.lr[0]
    work = works_of(server)[f"train {lr_name(lr)}"]
    job = Job(work="", shared=initial_shared(server, lr), version=0, clients=(0,), seed=0)
    declared = (work.inner if isinstance(work, Transformed) else work).expected(job)
    return sum(math.prod(spec.shape) for spec in declared.tensors.values())


def _cost(parts: Sequence[WorkItem], rates: Mapping[Kind, Rate], flops: Flops, ranks: int) -> Cost:
    training = [part for part in parts if part.kind in ("train", "alone", "pooled")]
    scoring = [part for part in parts if part not in training]
    return Cost(
        seconds=sum(
            rates[p.kind].seconds(p.workload, p.clients) / (1 if p.kind.startswith("pooled") else ranks) for p in parts
        ),
        train_tokens=sum(part.workload.units for part in training),
        evaluate_tokens=sum(part.workload.units for part in scoring),
        train_flops=sum(flops.train(part.workload) for part in training),
        evaluate_flops=sum(flops.forward(part.workload) for part in scoring),
    )


def _measure(
    experiment: Experiment,
    folder: Path,
    meter: MemoryMeter,
    say: Callable[[str], None],
    seconds: float,
    invited: int,
    base: int,
    columns: Sequence[str],
) -> _Measured:
    say("timing a few blocks")
    timed = replace(experiment, clients=for_timing(experiment.recipe, experiment.clients))
    profiler = Profiler(timed, folder, meter, seconds=seconds)
    source = client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"].source
    loaded, there = meter.now(), meter.available()
    everyone = tuple(range(len(experiment.server.roster)))
    train_block = profiler.block("train", everyone[:invited])
    apart = {"alone", "alone_best"} & set(columns) | ({"personal"} if stages_of(experiment.recipe) else set())
    most = max(train_block, profiler.block("alone", everyone) if apart else 0)
    clients = heaviest(source, everyone, most)
    meter.restart()
    first = profiler.train(clients[:1], steps=1)
    each = max(1, meter.since() - loaded)
    # What a block needs is known roughly by now: one that will not fit is told of, not tried.
    safe = max(1, min(most, math.floor((there - loaded) / each)))
    meter.restart()
    say(f"  one client takes {seconds_text(first.whole)} for a step; {most} stand side by side")
    tried = clients[: min(safe, train_block)]
    training = profiler.trained(tried)
    # A larger block is told from this one: its clients are side by side, and each adds as much.
    each = max(1, math.ceil((meter.since() - loaded) / len(tried) * profiler.luck(tried, training)))
    block = each * most
    rates: dict[Kind, Rate] = {"train": Rate.of(training)}
    guess = rates["train"].unit / 2
    say(f"  {len(tried)} of them took {seconds_text(training.whole)}; timing validation")
    scoring = profiler.scored(guess)
    rates["score"] = Rate.of(scoring)
    private: dict[str, int] = {}
    if apart:
        say("  timing clients alone")
        alone = profiler.private(clients[:safe], rates, "alone")
        rates, private = {**rates, **alone.rates}, dict.fromkeys(sorted(apart), alone.bytes)
    block = max(block, meter.since() - loaded)
    if "pooled" in columns:
        # What the C library has kept is of little use to batches of another size: it stays beside theirs.
        resident = max(0, meter.now() - loaded)
        meter.restart()
        say("  timing all rows together")
        joined = Profiler(pooled_experiment(experiment), folder, meter, seconds=seconds).private((0,), rates, "pooled")
        rates, private["pooled"] = {**rates, **joined.rates}, joined.bytes
        block = max(block, resident + meter.since() - loaded)
    memory = Memory(
        base=base,
        loaded=loaded,
        client=each,
        block=block,
        clients=most,
        peak=max(meter.peak(), loaded + block),
        available=there,
    )
    return _Measured(
        rates=rates, train_up=first.up, score_up=scoring.up, memory=memory, private=private, own=profiler.own()
    )
