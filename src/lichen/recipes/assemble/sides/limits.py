"""The most that a client can bring to each task of a recipe, by what it has declared of its rows.

A limit is what an honest client cannot exceed: of a round, the rows that its steps or passes see, each with every label
that it can have; of an evaluation, its own rows of that part; in a language model, as many tokens as fit into a row.
Methods of other packages may look at rows more often, so that nothing but their declarations limits them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from lichen.clients.methods import DILOCO, METHODS
from lichen.core.collecting.admission import Admission, Limits
from lichen.core.contracts.client import ClientWork
from lichen.recipes.assemble.sides.clients import TOKENS
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.assemble.sides.summed_scores import SUMMED_TEST
from lichen.recipes.schema.recipe import ExchangeConfig

__all__ = ["counting", "exchange_limits", "limits_of"]

TaskLimits = Callable[[str, int], Limits]
"""From a task and a client to the most that it can bring."""

TASKS: Mapping[str, str] = {
    **{"valid": "valid", "alone.valid": "valid", "alone.chosen": "valid", "gradient": "valid"},
    **{"test": "test", "alone.test": "test"},
    **{"personal.valid": "valid", "personal.test": "test", "choose.own": "valid", "choose.shared": "valid"},
}
"""The part of the rows that an evaluating task looks at."""


def limits_of(server: ServerSide) -> TaskLimits:
    """Of training, validation and the final scores, together and alone."""
    tokens_of = _row_tokens(server)

    @cache
    def limits(kind: str, client: int) -> Limits:
        member = server.roster[client]
        if server.recipe.masked is not None and kind in ("train", "valid", "gradient", SUMMED_TEST):
            return Limits()  # what comes is everybody's sum
        if kind in TASKS:
            return _evaluated(member.rows.get(TASKS[kind], 0) * tokens_of(client)[0])
        by_rows = kind == "train" and server.recipe.federation.weighting == "rows"
        weight = float(member.rows.get("train", 0)) if by_rows else None
        if kind not in ("train", "alone") or (kind == "train" and not _own_method(server)):
            return Limits(weight=math.inf if weight is None else weight)
        rows, steps = _seen(server, member.rows.get("train", 0))
        labels, tokens = (rows * each for each in tokens_of(client))
        population = server.recipe.optimizer.population if server.recipe.method is METHODS["cma"] else 1
        # Training counts a row twice that has a label and a teacher's answer.
        both = server.recipe.teacher is not None or server.recipe.semi is not None
        return _trained(
            count=labels * 2 if both else labels,
            tokens=tokens * population,
            steps=steps,
            weight=weight,
        )

    return lambda task, client: limits(_kind(task), client)


def exchange_limits(server: ServerSide, section: ExchangeConfig, *, fused: bool) -> TaskLimits:
    """Of clients of several architectures, whose tasks are ``<task>/<arch>``.

    Args:
        server: The server's side.
        section: What is exchanged.
        fused: Weights are averaged within an architecture.
    """
    fed, tokens_of = server.recipe.federation, _row_tokens(server)
    fixed = fed.fixed_steps
    public = section.digest(fixed) * section.public_batch_size
    steps = {"train": fixed if fused else section.first(fixed), "learn": fixed}

    @cache
    def limits(kind: str, client: int) -> Limits:
        member = server.roster[client]
        if kind in TASKS:
            return _evaluated(member.rows.get(TASKS[kind], 0))
        train = member.rows.get("train", 0)
        if kind == "predict":
            return Limits(weight=max(train, 1))
        if kind not in steps:
            return Limits()
        own = steps[kind] * fed.batch_size if train else 0
        rows = own + (public if kind == "learn" else 0)
        every = (steps[kind] if train else 0) + (section.digest(fixed) if kind == "learn" else 0)
        return _trained(count=rows, tokens=rows * tokens_of(client)[1], steps=every)

    return lambda task, client: limits(_kind(task), client)


def counting(task: str, work: ClientWork, rows_N: Sequence[float]) -> Admission:
    """Of one task that counts each of a client's rows once, or each of their tokens."""
    return Admission(works={task: work}, limits=lambda _, client: _evaluated(rows_N[client]))


def _kind(task: str) -> str:
    """What a task is, without its rate or its architecture.

    >>> _kind("train lr=0.3"), _kind("valid/text-cnn-16"), _kind("alone.test")
    ('train', 'valid', 'alone.test')
    """
    return task.partition(" ")[0].partition("/")[0]


def _row_tokens(server: ServerSide) -> Callable[[int], tuple[int, int]]:
    """For each client, how many labels its rows can have, and how many tokens: as many as fit into a row."""
    most = server.recipe.data.max_length
    if server.recipe.prefers:  # a pair of answers is one row
        return lambda client: (1, 2 * most)
    return lambda client: (most if server.recipe.writes else 1, most if server.roster[client].group == TOKENS else 1)


def _own_method(server: ServerSide) -> bool:
    return server.recipe.method is DILOCO or server.recipe.optimizer.name in iter(METHODS)


def _seen(server: ServerSide, rows: int) -> tuple[float, float]:
    """``(rows, steps)`` of a client's round at most, from so many rows."""
    recipe, fed = server.recipe, server.recipe.federation
    batch = fed.batch_size * fed.gradient_accumulation_steps
    if recipe.semi is not None:  # unlabelled rows, of which nobody declares how many there are, are seen too
        most = math.inf if fed.local_steps is None else fed.local_steps
        return most * (batch + recipe.semi.batch_size), most
    if not rows:
        return 0, 0
    if fed.local_epochs is None:
        steps, own = fed.fixed_steps, fed.fixed_steps * batch
    else:
        steps, own = fed.local_epochs * -(-rows // batch), fed.local_epochs * rows
    public = recipe.teacher.public_batch_size if recipe.teacher is not None and server.public is not None else 0
    secret = 0 if recipe.fingerprint is None else recipe.fingerprint.steps
    return own + steps * public + secret * batch, steps + secret


def _evaluated(count: float) -> Limits:
    return Limits(weight=count, metrics={"count": count})


def _trained(*, count: float, tokens: float, steps: float, weight: float | None = None) -> Limits:
    """A client weighs what it has counted, or 1, unless it weighs something else."""
    metrics = {"count": count, "tokens": tokens, "steps": steps}
    return Limits(weight=max(count, 1.0) if weight is None else weight, metrics=metrics)
