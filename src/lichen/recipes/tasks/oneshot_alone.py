"""Runs task ``oneshot`` as the server alone: statistics, heads of single clients and all test counts come from jobs.

Clients solve for heads of their own by themselves, and keep them. ``pooled`` and random partitions would need the rows
of all in one place.

Legend: N clients, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch

from lichen.algorithms.scores import require_everyone, score_everyone, score_summed
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import Report
from lichen.core.contracts.client import Dialogue
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.roster import PARTS, Roster
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.present.trace import Event
from lichen.recipes.artifacts.inputs import Inputs, agree
from lichen.recipes.assemble.class_names import save_class_names
from lichen.recipes.assemble.column import Column, column_of
from lichen.recipes.assemble.features import encoder_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.limits import counting
from lichen.recipes.assemble.sides.masks import unmasking
from lichen.recipes.assemble.sides.summed_scores import sums_scores
from lichen.recipes.assemble.sides.withdrawal.absent import absent_of, attendance_without
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.open_server import declared_classes
from lichen.recipes.sites.personal_heads import ask_for_heads, sums_down
from lichen.recipes.sites.statistics_node import TESTS, solver_of, statistics_works
from lichen.recipes.tasks.learning import Engines, EventObserver
from lichen.recipes.tasks.oneshot import save_head, way_of
from lichen.recipes.tasks.outcome import TaskResult, by_class, not_scored, over_all_rows
from lichen.server.sums.fixed_point import read_sums
from lichen.tasks.registry import task_of

__all__ = ["solve_alone"]


def solve_alone(
    recipe: Recipe,
    folder: RunFolder,
    observer: EventObserver,
    say: Callable[[str], None],
    roster: Roster,
    labels: Sequence[str],
    engines: Engines,
) -> TaskResult:
    """The head, and how it and its baselines score, without a row in this process.

    Args:
        recipe: A recipe that :func:`lichen.recipes.sites.open_server.refuse_rows` lets pass.
        folder: The run folder.
        observer: Sees the one round.
        say: Called with lines of progress.
        roster: Who takes part.
        labels: Those that sites have announced, in class order; none: by the recipe.
        engines: Make an engine over the nodes.

    Raises:
        LichenError: if nothing says what the classes are, or no client answers.
    """
    classes = tuple(labels) or declared_classes(recipe, roster)
    features, _ = encoder_of(recipe, str(recipe.model.name), exact=True)
    works = statistics_works(recipe, roster, classes=len(classes), width=features.width)
    inputs = Inputs(rows=sum(sum(roster.rows(part)) for part in PARTS), data=roster.digest(), model=features.base)
    agree(folder, recipe, inputs)
    save_class_names(folder, classes)
    absent = absent_of(recipe, roster.names)

    @cache
    def nodes() -> Engine:
        return unmasking(recipe, engines(ClientStore(folder.clients("alone", way_of(recipe)))), works)

    def job(work: str, head: Tree | None = None, version: int = 0) -> Job:
        shared, everyone = Shared(head or {}), tuple(range(len(roster)))
        return Job(work=work, shared=shared, version=version, clients=everyone, seed=0, base=features.base)

    def counts(work: str, part: str) -> Admission:
        one = works[work]
        return Admission(works={work: one}) if isinstance(one, Dialogue) else counting(work, one, roster.rows(part))

    summed = sums_scores(recipe)

    def tested(work: str, head: Tree | None = None, version: int = 0) -> Tree:
        """Everybody's confusion ``(N, K, K)``; sums of all together ``(1, ...)`` where the server learns no others."""
        name = TESTS[work] if summed else work
        sent, admission = job(name, head, version), counts(name, "test")
        if summed:
            return score_summed(nodes(), sent, admission)
        return {"confusion": score_everyone(nodes(), sent, admission)[1]["confusion"]}

    def learn() -> Tree:
        engine, rule = nodes(), solver_of(recipe)
        start, up, down = time.perf_counter(), engine.bytes_up, engine.bytes_down
        collected = collect(engine, [job("statistics")], rule, admission=counts("statistics", "train"))
        require_everyone(collected.attendance, job("statistics"), "statistics")  # the head is that of all rows
        total = collected.total
        head = rule.close(total, Shared())[0].trainable
        sent = torch.tensor([engine.bytes_up - up, engine.bytes_down - down])
        metrics, rows = tested("test", head), read_sums(total)["n"]
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        down_sums = {} if recipe.personal is None else sums_down(total)
        return {**head, **metrics, **down_sums, "rows": rows, "sent": sent, "seconds": seconds}

    def learn_alone() -> Tree:
        engine = nodes()
        collected = collect(engine, [job("alone")], admission=counts("alone", "train"))
        require_everyone(collected.attendance, job("alone"), "head of its own")
        return tested("alone.test", version=1)

    def learn_personal() -> Tree:
        scoring = ask_for_heads(nodes(), job("personal"), {name: found[name] for name in ("G", "H")}, counts)
        return {"confusion": score_everyone(nodes(), scoring, counts(scoring.work, "test"))[1]["confusion"]}

    def column(metrics: Tree) -> Column:
        return column_of(recipe, metrics, len(roster), summed=summed)

    say("the nodes encode their rows and send statistics")
    found = folder.tree("federated", learn)
    head = {name: x for name, x in found.items() if name.startswith("head.")}
    metrics = {name: x for name, x in found.items() if name not in (*head, "G", "H", "rows", "sent", "seconds")}
    columns = {"federated": column(metrics)}
    scores = columns["federated"].summed
    value = float(columns["federated"].value_N.nanmean()) if not summed else None if scores is None else scores.mean
    report = Report(
        round=1,
        clients=tuple(range(len(roster))),
        metrics={} if value is None else {"value": value},
        tokens=sum(rows for client, rows in enumerate(roster.rows("train")) if client not in absent),
        bytes_up=int(found["sent"][0]),
        bytes_down=int(found["sent"][1]),
        seconds=float(found["seconds"]),
        attendance=attendance_without(len(roster), absent),
    )
    observer(Event(column="federated", report=report, total_rounds=1, grid=way_of(recipe)))
    if "alone" in recipe.compare.baselines:
        say("each client solves for a head of its own")
        columns["alone"] = column(folder.tree("alone", learn_alone))
    if recipe.personal is not None:
        say("each client solves for a head between everybody's rows and its own")
        columns["personal"] = column(folder.tree("personal", learn_personal))
    always, name = _constant(recipe, found["rows"].numpy(), classes)
    if summed:  # a head of that class alone says what each client would score with it
        bias = torch.arange(len(classes)) == always
        one = {"head.weight": torch.zeros(len(classes), features.width), "head.bias": bias.to(head["head.bias"])}
        columns[name] = column(folder.tree(name, partial(tested, "test", one)))
    else:
        constant_NKK = torch.zeros_like(metrics["confusion"])
        constant_NKK[:, :, always] = metrics["confusion"].sum(2)
        columns[name] = column({"confusion": constant_NKK})
    save_head(folder, recipe, head, classes)
    rows = by_class([int(n) for n in metrics["confusion"].sum((0, 2)).tolist()], classes)
    extra = {**over_all_rows(recipe, columns), **not_scored(columns, len(roster)), **rows}
    return TaskResult(columns=columns, clients=roster.names, extra=extra)


def _constant(recipe: Recipe, rows_K: np.ndarray, classes: Sequence[str]) -> tuple[int, str]:
    """The class that most training rows have, from counts, as from the rows; and the name of its column."""
    labels = task_of(recipe.task).labels
    assert labels is not None
    rows_N = np.repeat(np.arange(len(classes)), rows_K.astype(np.int64))
    return int(labels.constant(rows_N, classes).argmax()), labels.baseline
