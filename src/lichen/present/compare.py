"""Computes a comparison's numbers: each method's mean and deviation over seeds, and its cost.

A row is a method over its seeds: mean and sample standard deviation of the metric, and the worst tenth
of clients beside it, because a mean hides those a method leaves behind. Where methods are nearer to each
other than their spread over seeds, they cannot be told apart, and more seeds are needed.

References:
    Bouthillier et al. "Accounting for Variance in Machine Learning Benchmarks". Conference on Machine
    Learning and Systems, 2021. https://arxiv.org/abs/2103.03098
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.present.column_names import column_in_files
from lichen.tasks.registry import task_of

__all__ = ["ComparisonRow", "Outcome", "Spread", "comparison_rows", "mean_and_std"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: Their mean.
        std: Their sample standard deviation; None for a single one.
        values: Each, in the order of the seeds.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What there is of a method.

    Attributes:
        method: Its name.
        summaries: Of its finished runs by seed, as :func:`lichen.present.summary.check_summary` returns them.
        wanted: How many seeds it is to have.
        memory: Bytes one client needs; None where not known.
        faults: Why runs failed, a sentence each.
        column: Which column of its runs the row shows; bytes and costs are those of federated alone.
    """

    method: str
    summaries: Mapping[int, Mapping[str, Any]]
    wanted: int
    memory: int | None = None
    faults: tuple[str, ...] = ()
    column: str = "federated"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """A method's line: bytes are means over seeds, and None stands where nothing is known.

    Attributes:
        method: Its name.
        metric: What ``value``, ``worst`` and ``base`` are; empty before the first run is finished.
        higher_is_better: Of it.
        seeds: Those that are finished.
        wanted: How many there are to be.
        value: The federated column's mean over clients.
        worst: Its mean over the worst tenth of clients.
        base: The foundation model's as it is.
        constant: What one answer to every row scores, the one that serves all training rows best, such as the most
            frequent class.
        constant_name: What files call it, such as ``majority``.
        constant_seeds: On how many seeds the row's own scores are exactly those: nothing of the rows was learned.
        forgotten_before: Perplexity on a text nobody trained on, before.
        forgotten_after: The same after.
        attack_success: Share of rows that show a back door's trigger and are given its class.
        refused: Share of unsafe requests that the model which is kept refuses.
        client_up: Bytes from a client for one training.
        client_down: Bytes to it.
        train_up: Bytes up in all, validation left out.
        train_down: Bytes down in all, validation left out.
        total: Bytes up and down in all, validation among them.
        memory: Bytes one client needs.
        calls: Texts a foundation model was asked about.
        written: Tokens it wrote or scored.
        seconds: Wall time of a run, all columns.
        rounds: Of the federation.
        target: What validation was to reach; None where nothing was to be.
        reached: How many seeds did.
        target_rounds: After how many rounds, over those seeds.
        target_bytes: After how many bytes both ways.
        target_seconds: After how many seconds, virtual ones where there was a clock.
        validation_counted: Whether bytes of training hold those of validation, too.
        faults: Why runs failed.
    """

    method: str
    metric: str = ""
    higher_is_better: bool = True
    seeds: tuple[int, ...] = ()
    wanted: int = 1
    value: Spread | None = None
    worst: Spread | None = None
    base: Spread | None = None
    constant: Spread | None = None
    constant_name: str = ""
    constant_seeds: int = 0
    forgotten_before: Spread | None = None
    forgotten_after: Spread | None = None
    attack_success: Spread | None = None
    refused: Spread | None = None
    client_up: float | None = None
    client_down: float | None = None
    train_up: float | None = None
    train_down: float | None = None
    total: float | None = None
    memory: int | None = None
    calls: float | None = None
    written: float | None = None
    seconds: float | None = None
    rounds: float | None = None
    target: float | None = None
    reached: int = 0
    target_rounds: Spread | None = None
    target_bytes: Spread | None = None
    target_seconds: Spread | None = None
    validation_counted: bool = False
    faults: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What JSON can write."""
        return asdict(self)


def mean_and_std(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing.

    >>> mean_and_std([1.0, 3.0])
    Spread(mean=2.0, std=1.4142135623730951, values=(1.0, 3.0))
    """
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    several = len(values) > 1
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if several else None
    return Spread(mean=mean, std=std, values=tuple(values))


def comparison_rows(outcomes: Sequence[Outcome]) -> tuple[ComparisonRow, ...]:
    """A row for each method, in their order.

    Raises:
        LichenError: if two methods were scored by different metrics.
    """
    rows = tuple(_row(outcome) for outcome in outcomes)
    metrics = list(dict.fromkeys(row.metric for row in rows if row.metric))
    if len(metrics) > 1:
        raise LichenError(
            f"{metrics[0]} cannot be compared with {metrics[1]}",
            where="compare.metric",
            fix="let all methods have one metric",
        )
    return rows


def _row(outcome: Outcome) -> ComparisonRow:
    runs = [outcome.summaries[seed] for seed in sorted(outcome.summaries)]
    if not runs:
        return ComparisonRow(method=outcome.method, wanted=outcome.wanted, memory=outcome.memory, faults=outcome.faults)
    labels = task_of(runs[0]["task"]).labels
    constant = labels.baseline if labels is not None else ""

    def score(column: str, part: str) -> Spread | None:
        name = column_in_files(column)
        found = [run["columns"].get(name, run["extra_columns"].get(name)) for run in runs]
        return mean_and_std([one[part] for one in found if one is not None and one[part] is not None])

    def extra(key: str) -> Spread | None:
        return mean_and_std(
            [float(run["extra"][key]) for run in runs if isinstance(run["extra"].get(key), int | float)]
        )

    def traffic(key: str) -> float | None:
        found = mean_and_std([float(run["traffic"][key]) for run in runs if run["traffic"] is not None])
        return None if found is None else found.mean

    mean = {key: None if (found := extra(key)) is None else found.mean for key in ("fm.asked", "fm.tokens_out")}
    reached = ComparisonRow(
        method=outcome.method,
        metric=runs[0]["metric"],
        higher_is_better=runs[0]["higher_is_better"],
        seeds=tuple(sorted(outcome.summaries)),
        wanted=outcome.wanted,
        value=score(outcome.column, "mean"),
        worst=score(outcome.column, "worst_decile"),
        constant=score(constant, "mean") if constant else None,
        constant_name=constant,
        constant_seeds=sum(_is_constant(run, column_in_files(outcome.column), constant) for run in runs),
        faults=outcome.faults,
    )
    if outcome.column != "federated":
        return reached
    return replace(
        reached,
        base=score("base", "mean"),
        forgotten_before=extra("forgotten.before"),
        forgotten_after=extra("forgotten.after"),
        attack_success=extra("attack_success.after"),
        refused=extra("refused.repaired") or extra("refused.federated"),
        client_up=traffic("client_up"),
        client_down=traffic("client_down"),
        train_up=traffic("up"),
        train_down=traffic("down"),
        total=math.fsum(run["bytes_up"] + run["bytes_down"] for run in runs) / len(runs),
        memory=outcome.memory,
        calls=mean["fm.asked"],
        written=mean["fm.tokens_out"],
        seconds=math.fsum(run["seconds"] for run in runs) / len(runs),
        rounds=traffic("rounds"),
        target=None if (target := extra("target")) is None else target.mean,
        reached=sum(run["extra"].get("target.rounds") is not None for run in runs),
        target_rounds=extra("target.rounds"),
        target_bytes=extra("target.bytes"),
        target_seconds=extra("target.seconds"),
        validation_counted=any(run["traffic"] is not None and run["traffic"]["validation"] for run in runs),
    )


def _is_constant(run: Mapping[str, Any], column: str, constant: str) -> bool:
    """Whether every score of a column is the constant answer's: over clients, and by each metric over all rows."""
    theirs = run["extra_columns"].get(constant)
    if theirs is None or run["columns"].get(column, run["extra_columns"].get(column)) != theirs:
        return False
    own = {key: value for key, value in run["extra"].items() if key.startswith(f"{constant}.")}
    return all(run["extra"].get(column + key.removeprefix(constant)) == value for key, value in own.items())
