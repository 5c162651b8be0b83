"""Reports a stream: every model on every period, who was there, what was rolled back, and the columns of its table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lichen.core.files.manifest import sha256_of
from lichen.core.files.record import RECORD
from lichen.present.charts.stream import stream_png
from lichen.present.clients import read_clients
from lichen.recipes.assemble.bases.in_force import PERIODS
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import metric_of, values_N
from lichen.recipes.tasks.outcome import TaskResult
from lichen.recipes.tasks.streams.drift import PeriodDrift
from lichen.recipes.tasks.streams.folders import DISTILLED, START, PeriodFolders
from lichen.recipes.tasks.streams.matrix import transfer_of
from lichen.recipes.tasks.streams.rebased import Rebased
from lichen.recipes.tasks.streams.scores import Scores, summed

__all__ = ["Course", "report"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a stream went, by period.

    Attributes:
        in_force: The model in force after it.
        verdicts: Why its own model is not, where it is not.
        drifts: What drift was found before it; None where there was nothing to compare with.
        rebased: What another base changed; None where the stream stays on one.
    """

    in_force: Mapping[str, str]
    verdicts: Mapping[str, str]
    drifts: Mapping[str, PeriodDrift | None]
    rebased: Rebased | None


def report(scores: Scores, course: Course) -> TaskResult:
    """Score all models on all periods, write what was found, and hand the model in force on to the stream's folder.

    Args:
        scores: Of models on periods, each on its base.
        course: How the stream went.
    """
    periods, folder = scores.periods, scores.folder
    in_force, verdicts, drifts = course.in_force, course.verdicts, course.drifts
    recipe, names = periods.recipe, tuple(in_force)
    rebase = None if recipe.stream is None else recipe.stream.rebase
    models = (START, *in_force.values())
    by_period = {name: [scores.mean(model, name) for model in models] for name in names}
    scores.clear()
    matrix = [[by_period[name][at] for name in names] for at in range(len(models))]
    metric = metric_of(recipe)
    looked = periods.recipe.stream is not None and periods.recipe.stream.detect != "none"
    transfer = transfer_of(matrix, higher_is_better=metric.higher_is_better)
    last = in_force[names[-1]]
    there = {name: read_clients(periods.of(name)) for name in names}
    found: dict[str, Any] = {
        "metric": metric.name,
        "higher_is_better": metric.higher_is_better,
        "periods": [
            {
                "name": name,
                "clients": {str(row["client"]): row["train"] for row in there[name]},
                "rows_sha256": periods.digests[name],
                "record_sha256": sha256_of(periods.of(name) / RECORD),
                "in_force": in_force[name],
                "rolled_back": verdicts.get(name),
                **({"base": periods.base_of(name)} if rebase else {}),
                **({"drift": None if (drift := drifts[name]) is None else drift.as_dict()} if looked else {}),
            }
            for name in names
        ],
        "matrix": matrix,
        **transfer.as_dict(),
        **({"on_new_base": periods.base_of(last) != recipe.model.name} if rebase else {}),
        **({"rebased": course.rebased.as_dict()} if course.rebased else {}),
        **_distilled(periods, course.rebased),
    }
    folder.write_json(PERIODS, found)
    stream_png(folder.path / "periods.png", found, title=recipe.name)
    if last != START:
        periods.hand_on(last, folder.path)
    alarms = [name for name, drift in drifts.items() if drift is not None and drift.alarm]
    return _result(scores, course, alarms, there, found)


def _distilled(periods: PeriodFolders, rebased: Rebased | None) -> dict[str, Any]:
    """Which run learned the answers; nothing where none did."""
    if rebased is None or rebased.begins != DISTILLED:
        return {}
    return {"distilled": {"record_sha256": sha256_of(periods.distilled / RECORD)}}


def _result(
    scores: Scores,
    course: Course,
    alarms: Sequence[str],
    there: Mapping[str, Sequence[Mapping[str, Any]]],
    found: Mapping[str, Any],
) -> TaskResult:
    """Columns over the test rows of all periods: by the model before each, after each, at the end, and at the start."""
    periods, in_force, verdicts = scores.periods, course.in_force, course.verdicts
    recipe, names = periods.recipe, tuple(in_force)
    everyone = sorted({str(row["client"]) for rows in there.values() for row in rows})
    before = dict(zip(names, (START, *in_force.values()), strict=False))
    last = in_force[names[-1]]

    def column(model: Mapping[str, str]) -> Column:
        sums = [([str(row["client"]) for row in there[name]], scores.of(model[name], name)) for name in names]
        metrics = summed(sums, everyone)
        return Column(value_N=values_N(recipe, metrics), metrics=metrics)

    columns = {
        "base": column(dict.fromkeys(names, START)),
        "federated": column(before),
        "after": column(in_force),
        "last": column(dict.fromkeys(names, last)),
    }
    summaries = {name: periods.summary(name) for name in names}
    failed = [name for name, one in summaries.items() if one is not None and one["failures"]]
    counts = [
        {
            part: sum(int(row[part] or 0) for rows in there.values() for row in rows if row["client"] == name)
            for part in ("train", "valid", "test")
        }
        for name in everyone
    ]
    return TaskResult(
        columns=columns,
        clients=tuple(everyone),
        extra={
            **_general(summaries, names[0], last),
            "stream.periods": float(len(names)),
            "stream.federated is": "each period's test rows by the model before it (prequential)",
            "stream.forgetting": found["mean_forgetting"],
            "stream.backward transfer": found["backward_transfer"],
            "stream.forward transfer": found["forward_transfer"],
            **({"stream.drifted": ", ".join(alarms)} if alarms else {}),
            **({"stream.rolled back": ", ".join(verdicts)} if verdicts else {}),
            **(course.rebased.summary() if course.rebased else {}),
            **({"stream.nothing learned": ", ".join(failed)} if failed else {}),
        },
        bytes_up=sum(one["bytes_up"] for one in summaries.values() if one is not None),
        bytes_down=sum(one["bytes_down"] for one in summaries.values() if one is not None),
        counts=tuple({**one, "cut": None} for one in counts),
        common_test=recipe.data.partition.by != "client" and recipe.data.partition.test == "shared",
    )


def _general(summaries: Mapping[str, Mapping[str, Any] | None], first: str, last: str) -> dict[str, float | str | None]:
    """The perplexity of the general text with the model at the start, and with the one that is in force at the end."""
    begun = summaries[first]
    if begun is None or "forgotten.before" not in begun["extra"]:
        return {}
    ended = summaries.get(last)
    after = begun["extra"]["forgotten.before"] if ended is None else ended["extra"]["forgotten.after"]
    return {"forgotten.before": begun["extra"]["forgotten.before"], "forgotten.after": after}
