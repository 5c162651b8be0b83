"""Runs a stream: each period is scored, then trained on in a run of its own, and the next goes on from what came out.

``periods/NAME`` in the stream's folder is an ordinary run over the rows of one period, and those of the past that its
clients train on again. It begins from the adapter that is in force. So a stream of one period is an ordinary run, a
stream that was stopped goes on with the period that is not finished, and rows that are added later make periods of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lichen.core.errors import LichenError
from lichen.core.files.manifest import sha256_of
from lichen.core.files.record import RECORD
from lichen.data.batches.content_digest import records_digest
from lichen.data.sources.record import Record
from lichen.models.adapters.table import kind_object
from lichen.present.charts.stream import stream_png
from lichen.present.clients import read_clients
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import metric_of, values_N
from lichen.recipes.assemble.open import fetch_named
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.rows.periods import has_clients
from lichen.recipes.rows.prepare import gather_periods
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.outcome import TaskResult
from lichen.recipes.tasks.streams.drift import DriftWatch, PeriodDrift
from lichen.recipes.tasks.streams.folders import START, PeriodFolders
from lichen.recipes.tasks.streams.matrix import transfer_of
from lichen.recipes.tasks.streams.scores import Scores, summed

__all__ = ["run_stream"]

PERIODS = "periods.json"
"""The periods, who was there, and the matrix."""

Say = Callable[[str], None]


class RunPeriod(Protocol):
    """Runs a recipe in a folder, as :func:`lichen.recipes.run.run` does."""

    def __call__(self, recipe: Recipe, *, out: Path, resume: bool, say: Say) -> object: ...


def run_stream(recipe: Recipe, folder: RunFolder, say: Say, *, run: RunPeriod) -> TaskResult:
    """Train the periods that are not finished, score all models on all periods, and report.

    Args:
        recipe: Has a section ``stream``.
        folder: The stream's.
        say: Called with lines of progress.
        run: Runs one period.

    Raises:
        LichenError: for what is wrong with the rows or a period, before anything is trained where that can be told.
    """
    stream = recipe.stream
    assert stream is not None
    adapter = recipe.model.adapter
    if kind_object(adapter.kind).peft is None:
        raise LichenError(
            f"{adapter.kind} has no form in which the next period could begin from it",
            where="model.adapter.kind",
            fix="use lora, or another kind that PEFT has",
        )
    fetch_named(recipe, say)
    gathered, waiting = gather_periods(recipe)
    digests = {
        name: records_digest(one.records) for name, one in gathered.items() if _has_clients(recipe, name, one.records)
    }
    for name in (name for name in gathered if name not in digests):
        say(f"period {name}: {len(gathered[name].records):,} rows, of which no client has enough: left out")
    if not digests:
        raise LichenError("no client has enough rows in any period", where="data.min_rows", fix="lower it")
    periods = PeriodFolders(recipe=recipe, root=folder.path / "periods", digests=digests)
    periods.require_order()
    names = tuple(digests)
    if len(names) == 1:
        say(f"one period only, {names[0]}: as an ordinary run")
        if stream.replay:
            raise LichenError("there is one period, and nothing before it", where="stream.replay", fix="remove it")
    if waiting:
        say(f"{waiting:,} rows wait until there are enough for another period ({stream.by})")
    for name in names:
        say(f"period {name}: {len(gathered[name].records):,} rows")
    del gathered
    scores = Scores(periods=periods, folder=folder, say=say)
    watch = DriftWatch(periods=periods, scores=scores, folder=folder)
    in_force, verdicts, drifts = _train(periods, scores, watch, names, say, run)
    return _report(periods, scores, folder, in_force, verdicts, drifts)


def _has_clients(recipe: Recipe, name: str, records: Sequence[Record]) -> bool:
    try:
        return has_clients(recipe, records)
    except LichenError as error:
        raise LichenError(error.what, where=f"period {name}: {error.where}", fix=error.fix) from None


def _train(
    periods: PeriodFolders, scores: Scores, watch: DriftWatch, names: Sequence[str], say: Say, run: RunPeriod
) -> tuple[dict[str, str], dict[str, str], dict[str, PeriodDrift | None]]:
    """The model in force after each period, why that of a period is not where it is not, and what drift was found."""
    stream = periods.recipe.stream
    assert stream is not None
    model, in_force, verdicts, drifts = START, dict[str, str](), dict[str, str](), dict[str, PeriodDrift | None]()
    last = -1
    for place, name in enumerate(names):
        try:
            scores.of(model, name)  # before it is trained on
            drift = drifts[name] = watch.of(name, model, names[:place], last)
            if drift is not None:
                say(f"period {name}: {drift}{', an alarm' if drift.alarm else ''}")
            alarm = drift is not None and drift.alarm
            last = place if alarm else last
            scores.clear()
            again = stream.react == "restart" and (alarm or stream.detect == "none")
            begins = START if again else model
            own = periods.recipe_of(name, begins)
            if periods.summary(name) is None:
                say(f"period {name}: training, from {'the start' if begins == START else begins}")
                target = periods.of(name)
                run(own, out=target, resume=(target / "recipe.yaml").exists(), say=say)
            else:
                periods.require(name, own)
            verdict = _verdict(periods, scores, name, model)
        except LichenError as error:
            raise LichenError(error.what, where=f"period {name}: {error.where}", fix=error.fix) from None
        if verdict:
            verdicts[name] = verdict
            say(f"period {name}: rolled back to {'the start' if model == START else model}: {verdict}")
        else:
            model = name
        in_force[name] = model
    return in_force, verdicts, drifts


def _verdict(periods: PeriodFolders, scores: Scores, name: str, model: str) -> str:
    """Why a period's result is not accepted beside the model that is in force; empty where it is."""
    stream = periods.recipe.stream
    assert stream is not None
    if stream.react != "roll-back":
        return ""
    found = periods.summary(name)
    assert found is not None
    before, after = (scores.loss(one, name) for one in (model, name))
    scores.clear()
    if not after <= before * (1 + stream.keep.recent):
        return f"the loss on its validation rows is {after:.4g}, and was {before:.4g}"
    extra = found["extra"]
    if "forgotten.before" in extra:
        before, after = float(extra["forgotten.before"]), float(extra["forgotten.after"])
        if not after <= before * (1 + stream.keep.general):
            return f"the perplexity of {periods.recipe.compare.retention_text} is {after:.4g}, and was {before:.4g}"
    return ""


def _report(
    periods: PeriodFolders,
    scores: Scores,
    folder: RunFolder,
    in_force: Mapping[str, str],
    verdicts: Mapping[str, str],
    drifts: Mapping[str, PeriodDrift | None],
) -> TaskResult:
    recipe, names = periods.recipe, tuple(in_force)
    models = (START, *in_force.values())
    by_period = {name: [scores.mean(model, name) for model in models] for name in names}
    scores.clear()
    matrix = [[by_period[name][at] for name in names] for at in range(len(models))]
    metric = metric_of(recipe)
    looked = periods.recipe.stream is not None and periods.recipe.stream.detect != "none"
    transfer = transfer_of(matrix, higher_is_better=metric.higher_is_better)
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
                **({"drift": None if (drift := drifts[name]) is None else drift.as_dict()} if looked else {}),
            }
            for name in names
        ],
        "matrix": matrix,
        **transfer.as_dict(),
    }
    folder.write_json(PERIODS, found)
    stream_png(folder.path / "periods.png", found, title=recipe.name)
    last = in_force[names[-1]]
    if last != START:
        periods.hand_on(last, folder.path)
    alarms = [name for name, drift in drifts.items() if drift is not None and drift.alarm]
    return _result(periods, scores, in_force, verdicts, alarms, there, found)


def _result(
    periods: PeriodFolders,
    scores: Scores,
    in_force: Mapping[str, str],
    verdicts: Mapping[str, str],
    alarms: Sequence[str],
    there: Mapping[str, Sequence[Mapping[str, Any]]],
    found: Mapping[str, Any],
) -> TaskResult:
    """Columns over the test rows of all periods: by the model before each, after each, at the end, and at the start."""
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
