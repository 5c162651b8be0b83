"""Makes the summary of a run out of its columns, its trace and what it cost."""

from __future__ import annotations

import math
import platform
from collections.abc import Collection, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from lichen.algorithms.scores import missing_of
from lichen.core.contracts.algorithm import Report
from lichen.present.clients import client_rows
from lichen.present.column_names import column_title
from lichen.present.gains import gains_of
from lichen.present.summary import attendance_of, check_summary, share_gaining, stronger_alone, traffic_of, worst_decile
from lichen.present.target import ACCURACY, bytes_to, rounds_to, seconds_to
from lichen.present.trace import Event, failed_rates, read_trace
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import lr_name, metric_of
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.assemble.sides.stated_masks import masks_of
from lichen.recipes.assemble.sides.stated_privacy import spent
from lichen.recipes.assemble.sides.withdrawal.absent import absent_of
from lichen.recipes.schema.read import recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.outcome import TaskResult
from lichen.tasks.task import Metric

__all__ = ["summarise", "who_gained"]

T = TypeVar("T")


def _score(column: Column | None, metric: Metric, common: bool, absent: Collection[int]) -> dict[str, Any] | None:
    """Over the clients that took part and have a score; None where nobody has."""
    if column is not None and column.summed is not None:
        known = column.summed.scored
        return {"mean": column.summed.mean, "worst_decile": column.summed.worst_decile} if known else None
    values = [] if column is None else _present(column.value_N.tolist(), absent)
    values = [x for x in values if metric.of_all or not math.isnan(x)]
    if not values:
        return None
    # One model on one test set gives everybody the same score, and a tenth of them none of its own.
    same = common and len(set(values)) == 1
    worst = None if same else worst_decile(values, metric.higher_is_better)
    return {"mean": sum(values) / len(values), "worst_decile": worst}


def who_gained(folder: Path, result: TaskResult, higher: bool) -> list[dict[str, Any]]:
    scores = {name: column.value_N.tolist() for name, column in result.columns.items() if len(column.value_N)}
    rounds = federated_rounds(read_trace(folder), result)
    missing = {name: missing_of(column.metrics) for name, column in result.columns.items()}
    return client_rows(result.clients, result.counts, scores, higher_is_better=higher, rounds=rounds, missing=missing)


def federated_rounds(events: Sequence[Event], result: TaskResult) -> list[Report]:
    """The rounds of the federated column, at the learning rate that was chosen."""
    lr = result.columns["federated"].lr
    grid = lr_name(lr) if lr is not None else None
    return [e.report for e in events if e.column == "federated" and (grid is None or e.grid == grid)]


def summarise(
    recipe: Recipe, folder: RunFolder, result: TaskResult, memory: int, joules: float | None
) -> dict[str, Any]:
    metric = metric_of(recipe)
    higher = metric.higher_is_better
    fixed = ("base", "alone", "federated", "pooled")
    absent = absent_of(recipe, result.clients) | result.departed
    scores = {name: _present(column.value_N.tolist(), absent) for name, column in result.columns.items()}
    against = stronger_alone(scores, higher)
    gaining = None if against is None else _share_gaining(scores[against], scores["federated"], higher)
    score = partial(_score, metric=metric, common=result.common_test, absent=absent)
    events = list(read_trace(folder.path))
    rates = failed_rates(e for e in events if e.column in result.training)
    rounds = federated_rounds(events, result)
    chosen = {f"lr.{name}": column.lr for name, column in result.columns.items() if column.lr is not None}
    summary = {
        "name": recipe.name,
        "question": recipe.question,
        "task": recipe.task,
        "metric": metric.name,
        "higher_is_better": higher,
        "columns": {name: score(result.columns.get(name)) for name in fixed},
        "extra_columns": {name: score(column) for name, column in result.columns.items() if name not in fixed},
        "share_gaining": gaining,
        "gaining_over": against,
        "gains": gains_of(
            scores, [one.get("train") for one in _present(result.counts, absent)], higher_is_better=higher
        ),
        "clients": len(result.clients),
        "bytes_up": sum(r.bytes_up for r in rounds) + result.bytes_up,
        "bytes_down": sum(r.bytes_down for r in rounds) + result.bytes_down,
        "traffic": traffic_of(rounds, up=result.bytes_up, down=result.bytes_down, validators=result.validators),
        "attendance": attendance_of(rounds),
        "training": {name: dict(numbers) for name, numbers in result.training.items()},
        "failures": _failures(result, rates),
        "attack": result.attack,
        "privacy": spent(recipe, folder.path, alone=not scores["federated"]),
        "masks": _masks(recipe, result),
        "seconds": folder.seconds(),
        "peak_memory_bytes": memory,
        "energy_joules": joules,
        "compute": result.compute,
        "read": result.read,
        **result.cards.summary(result.clients),
        "seed": recipe.seed,
        "versions": _versions(),
        "recipe_sha256": recipe_sha256(recipe),
        "extra": {**chosen, **_some_failed(rates), **result.extra, **_valuing(rounds), **_reached(recipe, rounds)},
    }
    return check_summary(summary)


def _present(each_N: Sequence[T], absent: Collection[int]) -> list[T]:
    """What is of each client, without those that never took part."""
    return [one for client, one in enumerate(each_N) if client not in absent]


def _share_gaining(alone: Sequence[float], federated: Sequence[float], higher: bool) -> float | None:
    """Of the clients that have a score; None where nobody has."""
    both = [pair for pair in zip(alone, federated, strict=True) if not any(map(math.isnan, pair))]
    return share_gaining([a for a, _ in both], [f for _, f in both], higher) if both else None


def _masks(recipe: Recipe, result: TaskResult) -> dict[str, Any] | None:
    """What masks promise, and how the clients' scores lie, where nobody told its own."""
    alone = not len(result.columns["federated"].value_N)
    masks = masks_of(recipe, len(result.clients), signed=result.signed, alone=alone)
    summed = {name: column.summed for name, column in result.columns.items() if column.summed is not None}
    deciles = {name: list(scores.deciles) for name, scores in summed.items() if scores.deciles}
    return masks and {**masks, "deciles": deciles}


def _failures(result: TaskResult, rates: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> list[str]:
    """A sentence for each column whose learning rate learned nothing, whether or not others did."""
    out = []
    for name, (failed, others) in rates.items():
        lr = result.columns[name].lr if name in result.columns else None
        if not others or (lr is not None and lr_name(lr).removeprefix("lr=") in failed):
            tried = f"at {', '.join(failed)}" + (f"; {', '.join(others)} did no better than that" if others else "")
            why = "no client's training counts in any round"
            out.append(f"{column_title(name)}: {why} {tried}: the model is as it began")
    return out


def _some_failed(rates: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> dict[str, str]:
    """Learning rates that failed beside others that did not."""
    return {f"lr.{name}.failed": ", ".join(failed) for name, (failed, others) in rates.items() if failed and others}


def _valuing(rounds: Sequence[Report]) -> dict[str, float]:
    """Seconds that rounds took to be valued, where any were."""
    seconds = [report.metrics["value_seconds"] for report in rounds if "value_seconds" in report.metrics]
    return {"value.seconds": sum(seconds)} if seconds else {}


def _reached(recipe: Recipe, rounds: Sequence[Report]) -> dict[str, float | str | None]:
    """Rounds, bytes and seconds until validation was at the recipe's target; none if it never was."""
    target = recipe.compare.target
    if target is None:
        return {}
    higher = recipe.compare.target_metric == "accuracy"
    metric = ACCURACY if higher else "valid"
    return {
        "target": target,
        "target.rounds": rounds_to(rounds, target, metric=metric, higher=higher),
        "target.bytes": bytes_to(rounds, target, metric=metric, higher=higher),
        "target.bytes.validation": bytes_to(rounds, target, metric=metric, higher=higher, validation=True),
        "target.seconds": seconds_to(rounds, target, metric=metric, higher=higher),
    }


def _versions() -> dict[str, str]:
    packages = ("lichen", "torch", "transformers", "peft", "safetensors", "scikit-learn")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


@cache
def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
