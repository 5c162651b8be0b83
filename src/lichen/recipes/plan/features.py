"""Plans task ``oneshot`` and a teacher's labelling.

Both spend nearly all of their time in one pass of a frozen encoder over rows that can be counted, so a sample
of rows is encoded and the rest follows by tokens. One-shot statistics and a teacher's answers have one shape
whatever is in them, so that their bytes are exact. The students of ``teacher`` are planned like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from lichen.clients.distillation.teacher_labels import LocalTeacher
from lichen.clients.masking.masked import Masked
from lichen.clients.statistics.sufficient import Statistics
from lichen.core import tree as trees
from lichen.core.message import Job
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard
from lichen.data.batches.text import encode_classify
from lichen.data.sources.record import Record
from lichen.models.arithmetic import arithmetic_of
from lichen.models.features import EncoderFeatures
from lichen.recipes.assemble.features import encoder_of, featurizer
from lichen.recipes.assemble.open import fetch_named, open_recipe
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.workload import Workload
from lichen.recipes.help.public_labels import public_labels
from lichen.recipes.help.steps import with_answer_index
from lichen.recipes.help.teacher import ask, classes_in_answer, with_settings
from lichen.recipes.plan.adapt import estimate_columns, flops_of
from lichen.recipes.plan.estimate import Cost, Disk, Estimate, Memory, free_disk_bytes
from lichen.recipes.plan.masks import MaskCost, mask_cost
from lichen.recipes.plan.memory import MemoryMeter
from lichen.recipes.plan.synthetic import with_writing
from lichen.recipes.plan.timing import evenly_spaced
from lichen.recipes.plan.traffic import TrafficEstimate
from lichen.recipes.plan.workload import budget, invitations
from lichen.recipes.rows.prepare import classes_of, gather_all
from lichen.recipes.rows.public import labelled_of, split_public
from lichen.recipes.rows.reading import report_read
from lichen.recipes.schema.read import recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.statistics_node import hidden
from lichen.recipes.tasks.oneshot import engine_for, solve

__all__ = ["estimate_oneshot", "estimate_with_teacher"]

Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """An encoder's pass over rows: what it costs, and the features of those that were tried."""

    cost: Cost
    memory: Memory
    tried: ArrayShard


def _encoder_pass(
    recipe: Recipe,
    features: EncoderFeatures,
    tokenizer: Any,
    classes: Sequence[str],
    records: Sequence[Record],
    meter: MemoryMeter,
    seconds: float,
) -> _Pass:
    def workload_of(rows: Sequence[Record]) -> Workload:
        encoded = encode_classify(rows, tokenizer, max_length=recipe.data.max_length, classes=tuple(classes))
        length_N = np.asarray([len(ids) for ids, _ in encoded], dtype=np.int64)
        return Workload(rows=len(length_N), tokens=int(length_N.sum()), square=int((length_N**2).sum()))

    make, loaded = featurizer(recipe, features, tokenizer, classes), meter.now()
    meter.restart()
    make([records[i] for i in evenly_spaced(range(len(records)), 4)])
    sample = evenly_spaced(range(len(records)), 32)
    start_time = time.perf_counter()
    tried = make([records[i] for i in sample])
    each = (time.perf_counter() - start_time) / len(sample)
    if each * len(sample) < seconds / 2:
        sample = evenly_spaced(range(len(records)), max(32, int(seconds / each)))
        start_time = time.perf_counter()
        tried = make([records[i] for i in sample])
        each = (time.perf_counter() - start_time) / len(sample)
    block, whole = max(1, meter.since() - loaded), workload_of(records)
    unit = each * len(sample) / workload_of([records[i] for i in sample]).tokens
    weights = list(features.model.parameters())
    return _Pass(
        cost=Cost(
            seconds=unit * whole.tokens,
            evaluate_tokens=whole.tokens,
            evaluate_flops=arithmetic_of(features.model, {}).forward(whole),
        ),
        memory=Memory(
            base=sum(x.numel() * x.element_size() for x in weights),
            loaded=loaded,
            client=block,
            block=block,
            clients=1,
            peak=meter.peak(),
            available=meter.available(),
        ),
        tried=tried,
    )


def _weights(model: Any) -> int:
    return sum(x.numel() for x in model.parameters())


def _masks_of_statistics(recipe: Recipe, features: EncoderFeatures, classes: int, clients: int) -> MaskCost | None:
    """What masks over the statistics cost; None where there are none."""
    statistics = Statistics(lambda batch: batch["x_CBF"], classes=classes, width=features.width)
    work = hidden(recipe, statistics, clients)
    job = Job(work="statistics", shared=Shared(), version=0, clients=(0,), seed=0, base=features.base)
    return mask_cost(recipe, work, job, clients) if isinstance(work, Masked) else None


def estimate_oneshot(recipe: Recipe, folder: Path, meter: MemoryMeter, say: Say, seconds: float) -> Estimate:
    """Task ``oneshot``: features of all rows, then one message a client.

    Args:
        recipe: The recipe.
        folder: For what is written; the caller removes it.
        meter: The device's memory.
        say: Called with lines of progress.
        seconds: About how long the encoder is timed.
    """
    start_time = time.perf_counter()
    fetch_named(recipe, say)
    gathered = gather_all(recipe)
    classes = classes_of(recipe, gathered.records)
    public_split = split_public(recipe, gathered.records)
    clients_data = labelled_of(public_split.clients_data)
    features, tokenizer = encoder_of(recipe, str(recipe.model.name), exact=True)
    read = report_read(recipe, gathered, public_split, tokenizer, say)
    start = time.perf_counter() - start_time
    say("encoding some rows")
    rows = [record for client_data in clients_data for record in (*client_data.train, *client_data.test)]
    nodes = recipe.engine.nodes if recipe.engine_kind.nodes else 0
    # Nodes load the encoder, too, and encode what trains once more.
    trained = [record for client_data in clients_data for record in client_data.train] if nodes else []
    passed = _encoder_pass(recipe, features, tokenizer, classes, [*rows, *trained], meter, seconds)
    run_folder, shard, count = RunFolder(folder, recipe_sha256=recipe_sha256(recipe)), passed.tried, len(clients_data)

    def solved(parts: Sequence[ArrayShard]) -> tuple[float, int, int]:
        start_time = time.perf_counter()
        engine, admission = engine_for(recipe, parts, len(classes), run_folder, base=features.base)
        solve(recipe, engine, admission, range(len(parts)), base=features.base)
        return time.perf_counter() - start_time, engine.bytes_up // len(parts), engine.bytes_down // len(parts)

    solved([shard])
    once, up, down = solved([shard])
    message = max(0.0, solved([shard] * 5)[0] - once) / 4
    alone, again = ("alone" in recipe.compare.baselines) * count, recipe.compare.partitions
    head = (features.width + 1) * len(classes)
    # A random partition has as many clients as the roster, on average.
    messages, solutions = count + alone + 1 + again * count, 1 + alone + 1 + again
    heads = Cost(seconds=message * messages + max(0.0, once - message) * solutions)
    masks, facts = _masks_of_statistics(recipe, features, len(classes), count), None
    if masks is not None:
        facts = masks.as_dict(recipe, clear=up, masked=masks.up)
        up, down = masks.up, down + masks.down
        heads = replace(heads, seconds=heads.seconds + count * masks.seconds + masks.server_least)
    cached = sum(len(o.train) + len(o.test) for o in clients_data) * (4 * features.width + 8)
    return Estimate(
        clients=count,
        trained=head,
        frozen=_weights(features.model),
        bytes=TrafficEstimate(
            client_up=up,
            client_down=down,
            round_up=count * up,
            round_down=count * down,
            up=count * up,
            down=count * down,
        ),
        memory=replace(passed.memory, copies=nodes),
        disk=Disk(private=0, shared=cached + 8 * head, free=free_disk_bytes()),
        columns={"features": passed.cost, "heads": heads},
        start=start * 2 if nodes else start,
        notes=(f"seconds of {nodes} nodes are those of one process, which is an estimate",) if nodes else (),
        read=read,
        masks=facts,
    )


def estimate_with_teacher(recipe: Recipe, folder: Path, meter: MemoryMeter, say: Say, seconds: float) -> Estimate:
    """Task ``classify`` with a teacher: its pass over public and test rows, then the federation with and without it.

    Where public labels stand in its place there is no such pass.

    Args:
        recipe: The recipe.
        folder: For what is written; the caller removes it.
        meter: The device's memory.
        say: Called with lines of progress.
        seconds: About how long each kind of work is timed.
    """
    assert recipe.teacher is not None
    start_time = time.perf_counter()
    loaded = open_recipe(recipe, say=say, keep_private=False, report_counts=True)
    experiment, public_split, clients_data, classes = (
        loaded.experiment,
        loaded.public_split,
        loaded.clients_data,
        loaded.classes,
    )
    start, passed, frozen = time.perf_counter() - start_time, None, 0
    if recipe.teacher.kind == "labels":
        (answers, public, size), up, down = public_labels(loaded), 0, 0
    else:
        assert loaded.public is not None
        features, tokenizer = encoder_of(recipe, recipe.teacher.name, exact=False)
        start = time.perf_counter() - start_time
        say("encoding some rows")
        tests = [record for client_data in clients_data for record in client_data.test]
        read = [*public_split.labelled, *public_split.unlabelled, *tests]
        passed = _encoder_pass(recipe, features, tokenizer, classes, read, meter, seconds)
        frozen = _weights(features.model)
        texts, count = [record.text for record in public_split.unlabelled], classes_in_answer(recipe, classes)
        run_folder = RunFolder(folder / "answers", recipe_sha256=recipe_sha256(recipe))
        mute = LocalTeacher(lambda some: torch.zeros(len(some), len(classes)), classes=classes, top_k=count)
        answers, up, down = ask(mute, texts, classes, count, run_folder)
        public, size = loaded.public, sum(len(text.encode()) for text in texts)
    apart = tuple(c for c in recipe.compare.baselines if c != "no_help")

    def only(columns: tuple[Any, ...]) -> Recipe:
        return recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"baselines": columns})})

    with_teacher = experiment.with_server(recipe=only(()))
    if recipe.teacher.at != "server":
        # Every client is sent the public texts once; their answers ride along in every job.
        down += size * len(clients_data)
        with_teacher = with_teacher.with_server(
            start=experiment.start | Shared(frozen=with_settings(recipe.teacher, answers)),
            public=with_answer_index(public, np.arange(public.size)),
        )
    plain, learned = (
        estimate_columns(b, budget(b, invitations(b)), partial(flops_of, b), folder / name, meter, say, seconds)
        for name, b in (("plain", experiment.with_server(recipe=only(apart))), ("taught", with_teacher))
    )
    columns = {**({"teacher": passed.cost} if passed else {}), **learned.columns}
    columns |= {"without": plain.columns["federated"]} if "no_help" in recipe.compare.baselines else {}
    columns |= {name: cost for name, cost in plain.columns.items() if name in apart}
    sent, peak = learned.bytes, max(part.memory.peak for part in (passed, plain, learned) if part)
    found = replace(
        learned,
        trained=sum(x.numel() for x in experiment.start.trainable.values()),
        frozen=learned.frozen + frozen,
        bytes=replace(sent, up=sent.up + up, down=sent.down + down),
        memory=replace(learned.memory, base=learned.memory.base + (passed.memory.base if passed else 0), peak=peak),
        disk=replace(
            plain.disk, shared=plain.disk.shared + learned.disk.shared + trees.nbytes(answers), free=free_disk_bytes()
        ),
        columns=columns,
        start=start,
        read=loaded.read,
    )
    return with_writing(found, loaded, folder, say)
