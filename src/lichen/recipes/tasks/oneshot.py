"""Runs task ``oneshot``: a closed-form head on frozen features, equal to pooled training.

Features are taken once from the frozen encoder; each client sends its sufficient statistics; the server solves for the
head, by ridge regression or, with ``model.head: lda``, by discriminant analysis (FedCGS). The recipe's answer is
checked against pooled training and under random re-partitions of the same rows: the statistics are exact sums, so every
partition must agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from lichen.clients.masking.masked import Masked
from lichen.clients.statistics.closed_head import predict
from lichen.clients.statistics.sufficient import Statistics
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import Collected, collect
from lichen.core.contracts.algorithm import Report
from lichen.core.contracts.client import ClientTask
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.seeds import numpy_generator
from lichen.core.store import ClientStore, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.content_digest import records_digest
from lichen.data.batches.shards import ArrayShard
from lichen.engines.local import LocalEngine
from lichen.present.trace import Event
from lichen.recipes.artifacts.inputs import Inputs, agree
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.column import Column, over_ranks, recipe_engine
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.assemble.features import encoder_of, featurizer
from lichen.recipes.assemble.open import fetch_named
from lichen.recipes.assemble.run_folder import RunFolder, save_roster
from lichen.recipes.assemble.sides.limits import counting
from lichen.recipes.assemble.sides.masks import unmasking
from lichen.recipes.assemble.sides.withdrawal.absent import absent_of, attendance_without, rows_left, without_absent
from lichen.recipes.rows.client_counts import counts_of, shared_test
from lichen.recipes.rows.prepare import ClientData, classes_of, first_of, gather_all
from lichen.recipes.rows.public import labelled_of, split_public
from lichen.recipes.rows.reading import report_read
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.personal_heads import heads_here
from lichen.recipes.sites.statistics_node import feature_source, hidden, roster_of, solver_of
from lichen.recipes.tasks.outcome import TaskResult, baseline, over_all_rows, tested
from lichen.server.sums.stored import SUMS, dump_sums, load_sums

__all__ = ["confusion", "engine_for", "oneshot", "run_oneshot", "save_head", "solve", "way_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OneShot:
    """What came out: the columns, the head and the sums it is made of, and how exactly partitions agreed."""

    columns: Mapping[str, Column]
    head: Tree
    sums: Any
    partitions: int
    identical: int
    largest_difference: float
    bytes_up: int
    bytes_down: int


def engine_for(
    recipe: Recipe,
    shards: Sequence[ArrayShard],
    classes: int,
    folder: RunFolder,
    *,
    base: str = "",
    nodes: ExitStack | None = None,
    absent: Collection[int] = (),
) -> tuple[Engine, Admission]:
    """An engine whose clients hold shards, on several ranks all of theirs; and what counts of their messages.

    Args:
        recipe: The recipe.
        shards: Features by client.
        classes: How many.
        folder: The run folder.
        base: Digest of the encoder.
        nodes: The clients live where the recipe's engine says, in processes that this stack ends; None: here.
        absent: Clients that do not answer.
    """
    statistics = Statistics(features=lambda batch: batch["x_CBF"], classes=classes, width=shards[0].x.shape[-1])
    work = statistics if nodes is None else hidden(recipe, statistics, len(shards))
    client_task = ClientTask(work=work, source=feature_source(shards))
    store, block = ClientStore(folder.path / "state" / "none"), recipe.engine.clients_per_block or 64
    local = LocalEngine({"statistics": client_task}, store, base=base, block_size=block)
    engine = over_ranks(folder.ranks, local)
    if nodes is not None and recipe.engine_kind.nodes:
        engine = recipe_engine(recipe, folder, store, nodes, local=lambda: local)
    engine = without_absent(engine, absent, folder.ranks)
    if isinstance(work, Masked):
        return unmasking(recipe, engine, {"statistics": work}), Admission(works={"statistics": work})
    return engine, counting("statistics", statistics, [shard.size for shard in shards])


def way_of(recipe: Recipe) -> str:
    """How the recipe solves for the head, in a word."""
    return "lda" if recipe.model.head == "lda" else f"lambda={recipe.ridge:g}"


def summed(
    recipe: Recipe, engine: Engine, admission: Admission, clients: Sequence[int], *, base: str = ""
) -> Collected:
    """One round: ask these clients for their statistics, and add them up."""
    job = Job(work="statistics", shared=Shared(), version=0, clients=tuple(clients), seed=0, base=base)
    return collect(engine, [job], solver_of(recipe), admission=admission)


def solve(recipe: Recipe, engine: Engine, admission: Admission, clients: Sequence[int], *, base: str = "") -> Tree:
    """The head of these clients' sums."""
    total = summed(recipe, engine, admission, clients, base=base).total
    return solver_of(recipe).close(total, Shared())[0].trainable


def confusion(head: Tree, shard: ArrayShard, classes: int) -> Tensor:
    """Counts ``(K, K)`` of (true, predicted)."""
    out = torch.zeros(classes, classes, dtype=torch.float64)
    truth = torch.from_numpy(shard.labels)
    out.index_put_(
        (truth, predict(head, torch.from_numpy(shard.x))), torch.ones(len(truth), dtype=torch.float64), accumulate=True
    )
    return out


def oneshot(
    recipe: Recipe,
    train: Sequence[ArrayShard],
    test: Sequence[ArrayShard],
    classes: int,
    folder: RunFolder,
    observer: Callable[[Event], None],
    say: Callable[[str], None],
    base: str = "",
    absent: Collection[int] = (),
) -> OneShot:
    """Run the round and hold it against alone, pooled and re-partitioned data.

    Args:
        recipe: The recipe.
        train: Features by client, of the absent ones none.
        test: The same of test rows.
        classes: How many.
        folder: The run folder, in which the sums stay.
        observer: Sees the one round.
        say: Called with lines of progress.
        base: Digest of the encoder.
        absent: Clients that never took part.
    """
    start, everyone = time.perf_counter(), range(len(train))

    def ask() -> Tree:
        with ExitStack() as stack:
            engine, admission = engine_for(recipe, train, classes, folder, base=base, nodes=stack, absent=absent)
            total = summed(recipe, engine, admission, everyone, base=base).total
            return dump_sums(total, up=engine.bytes_up, down=engine.bytes_down)

    total, bytes_up, bytes_down = load_sums(folder.tree(SUMS, ask))
    head = solver_of(recipe).close(total, Shared())[0].trainable

    def column(heads: Sequence[Tree]) -> Column:
        metrics = {"confusion": torch.stack([confusion(h, s, classes) for h, s in zip(heads, test, strict=True)])}
        return Column(value_N=values_N(recipe, metrics), metrics=metrics)

    columns = {"federated": column([head] * len(test))}
    seconds = time.perf_counter() - start
    report = Report(
        round=1,
        clients=tuple(everyone),
        metrics={"value": float(columns["federated"].value_N.nanmean())},
        tokens=sum(s.size for s in train),
        bytes_up=bytes_up,
        bytes_down=bytes_down,
        seconds=seconds,
        attendance=attendance_without(len(train), absent),
    )
    observer(Event(column="federated", report=report, total_rounds=1, grid=way_of(recipe)))
    if "alone" in recipe.compare.baselines:
        columns["alone"] = column(
            [
                # Nobody scores the head of a client that never took part: it has no test rows here.
                head if c in absent else solve(recipe, *engine_for(recipe, [s], classes, folder), (0,))
                for c, s in enumerate(train)
            ]
        )
    x = np.concatenate([s.x for s in train])
    labels = np.concatenate([s.labels for s in train])
    whole = solve(recipe, *engine_for(recipe, [ArrayShard(x=x, labels=labels)], classes, folder), (0,))
    if "pooled" in recipe.compare.baselines:
        columns["pooled"] = column([whole] * len(test))
    say(f"comparing with pooled under {recipe.compare.partitions} random partitions")
    test_x = torch.from_numpy(np.concatenate([s.x for s in test]))
    same, worst = 0, _difference(head, whole)
    for p in range(recipe.compare.partitions):
        rng = numpy_generator(recipe.seed, "partition", p)
        client_data = rng.integers(0, int(rng.integers(2, 2 * len(train) + 1)), size=len(labels))
        parts = [ArrayShard(x=x[client_data == k], labels=labels[client_data == k]) for k in np.unique(client_data)]
        other = solve(recipe, *engine_for(recipe, parts, classes, folder), range(len(parts)))
        same += bool(torch.equal(predict(other, test_x), predict(whole, test_x)))
        worst = max(worst, _difference(other, whole))
    return OneShot(
        columns=columns,
        head=head,
        sums=total,
        partitions=recipe.compare.partitions,
        identical=same,
        largest_difference=worst,
        bytes_up=report.bytes_up,
        bytes_down=report.bytes_down,
    )


def _difference(a: Tree, b: Tree) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def save_head(folder: RunFolder, recipe: Recipe, head: Tree, classes: Sequence[str]) -> None:
    """Write the head, and what it is a head of."""
    if folder.ranks.first:
        save_tree(folder.path / "model" / "head.safetensors", head, shared=True)
        save_tree(folder.path / "state" / "final.safetensors", head)
    about = {"encoder": recipe.model.name, "pooling": "mean", "normalize": True, "classes": list(classes)}
    folder.write_json("model/config.json", about, shared=True)


def run_oneshot(
    recipe: Recipe, folder: RunFolder, observer: Callable[[Event], None], say: Callable[[str], None]
) -> TaskResult:
    """Task ``oneshot``."""
    with folder.ranks.ahead():
        fetch_named(recipe, say)
    gathered = gather_all(recipe)
    classes = classes_of(recipe, gathered.records)
    public_split = split_public(recipe, gathered.records)
    declaring = labelled_of(public_split.clients_data)
    absent = absent_of(recipe, [one.name for one in declaring])
    clients_data = rows_left(declaring, absent)
    features, tokenizer = encoder_of(recipe, str(recipe.model.name), exact=True)
    read = report_read(recipe, gathered, public_split, tokenizer, say)
    make = featurizer(recipe, features, tokenizer, classes)
    agree(
        folder, recipe, Inputs(rows=len(gathered.records), data=records_digest(gathered.records), model=features.base)
    )
    save_class_names(folder, classes)
    save_roster(folder, roster_of(declaring), gathered.cards)
    say(f"features of {sum(len(o.train) + len(o.test) for o in clients_data):,} rows of {len(clients_data)} clients")

    def shards_of_part(part: str) -> list[ArrayShard]:
        def fresh(client_data: ClientData) -> Tree:
            made = make(getattr(client_data, part))
            return {"x": torch.from_numpy(made.x), "labels": torch.from_numpy(made.labels)}

        first = first_of([getattr(client_data, part) for client_data in clients_data])
        makes = {i: partial(fresh, clients_data[i]) for i in sorted(set(first) - absent)}
        found = dict(zip(makes, folder.trees({f"features/{part}-{i}": m for i, m in makes.items()}), strict=True))
        made = {i: ArrayShard(x=tree["x"].numpy(), labels=tree["labels"].numpy()) for i, tree in found.items()}
        nothing = next(iter(made.values())).between(0, 0)
        return [made.get(i, nothing) for i in first]

    train, test = shards_of_part("train"), shards_of_part("test")
    done = oneshot(recipe, train, test, len(classes), folder, observer, say, features.base, absent)
    columns = {**done.columns, **baseline(recipe, train, test, classes)}
    own: Tree = {}
    if recipe.personal is not None:
        say("each client solves for a head between everybody's rows and its own")
        rows = {"train": train, "valid": shards_of_part("valid"), "test": test}
        own = folder.tree("personal", partial(heads_here, recipe, rows, done.sums, len(classes), folder, features.base))
        metrics = {"confusion": own["confusion"]}
        columns["personal"] = Column(value_N=values_N(recipe, metrics), metrics=metrics)
    save_head(folder, recipe, done.head, classes)
    extra: dict[str, float | str | None] = {
        "partitions": float(done.partitions),
        "partitions.identical": float(done.identical),
        "partitions.largest_difference": done.largest_difference,
        **({"personal.bytes_down": float(own["bytes_down"])} if own else {}),
        **over_all_rows(recipe, columns),
        **tested([o.test for o in clients_data], classes),
    }
    counts = counts_of(recipe, clients_data, tokenizer)
    names, common = tuple(o.name for o in clients_data), shared_test(clients_data)
    return TaskResult(
        columns=columns, clients=names, extra=extra, counts=counts, common_test=common, read=read, cards=gathered.cards
    )
