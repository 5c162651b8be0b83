"""Runs a stream: each period is scored, then trained on in a run of its own, and the next goes on from what came out.

``periods/NAME`` in the stream's folder is an ordinary run over the rows of one period, and those of the past that its
clients train on again. It begins from the adapter that is in force. So a stream of one period is an ordinary run, a
stream that was stopped goes on with the period that is not finished, and rows that are added later make periods of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

from lichen.core.errors import LichenError
from lichen.data.batches.content_digest import records_digest
from lichen.data.sources.record import Record
from lichen.recipes.assemble.open import fetch_named
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.rows.periods import clients_of
from lichen.recipes.rows.prepare import gather_periods
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.sections.stream import RebaseConfig
from lichen.recipes.tasks.outcome import TaskResult
from lichen.recipes.tasks.streams.distilled import count_answers, distil
from lichen.recipes.tasks.streams.drift import DriftWatch, PeriodDrift
from lichen.recipes.tasks.streams.folders import DISTILLED, START, PeriodFolders
from lichen.recipes.tasks.streams.rebased import Rebased, require_base
from lichen.recipes.tasks.streams.report import Course, report
from lichen.recipes.tasks.streams.required import require_adapter, require_names
from lichen.recipes.tasks.streams.scores import Scores

__all__ = ["run_stream"]

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
    require_adapter(recipe)
    fetch_named(recipe, say)
    gathered, waiting = gather_periods(recipe)
    begun = any((folder.path / "periods").glob("*/summary.json"))
    digests = {
        name: records_digest(one.records)
        for name, one in gathered.items()
        if _has_clients(recipe, name, one.records, begun=begun)
    }
    for name in (name for name in gathered if name not in digests):
        say(f"period {name}: {len(gathered[name].records):,} rows, of which no client has enough: left out")
    require_names(recipe, tuple(digests))
    periods = PeriodFolders(recipe=recipe, root=folder.path / "periods", digests=digests)
    periods.require_order()
    names = tuple(digests)
    if len(names) == 1:
        say(f"one period only, {names[0]}: as an ordinary run")
    if waiting:
        say(f"{waiting:,} rows wait until there are enough for another period ({stream.by})")
    for name in names:
        say(f"period {name}: {len(gathered[name].records):,} rows")
    del gathered
    scores = Scores(periods=periods, folder=folder, say=say)
    require_base(scores)
    return report(*_train(scores, names, say, run))


def _has_clients(recipe: Recipe, name: str, records: Sequence[Record], *, begun: bool) -> bool:
    try:
        return clients_of(recipe, records) is not None
    except LichenError as error:
        fix = f"take these rows out until there are more, or in a new run: {error.fix}" if begun else error.fix
        raise LichenError(error.what, where=f"period {name}: {error.where}", fix=fix) from None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a period begins with.

    Attributes:
        model: In force, a period or ``START``.
        base: What is trained.
        alarm: Place of the period that had the last alarm, -1 of none.
    """

    model: str = START
    base: str
    alarm: int = -1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What came of a period.

    Attributes:
        standing: What the next one begins with.
        drift: What was found before it was trained on; None where there was nothing to compare with.
        verdict: Why its own model is not in force; empty where it is.
        rebased: What another base changed; None where it is on that of before.
    """

    standing: Standing
    drift: PeriodDrift | None
    verdict: str
    rebased: Rebased | None


def _train(scores: Scores, names: Sequence[str], say: Say, run: RunPeriod) -> tuple[Scores, Course]:
    """How the stream goes, and the scores with the base of each model."""
    standing, steps = Standing(base=str(scores.periods.recipe.model.name)), dict[str, Step]()
    for place, name in enumerate(names):
        try:
            scores, steps[name] = _train_one(scores, names[:place], name, standing, say, run)
        except LichenError as error:
            raise LichenError(error.what, where=f"period {name}: {error.where}", fix=error.fix) from None
        standing = steps[name].standing
    return scores, Course(
        in_force={name: step.standing.model for name, step in steps.items()},
        verdicts={name: step.verdict for name, step in steps.items() if step.verdict},
        drifts={name: step.drift for name, step in steps.items()},
        rebased=next((step.rebased for step in steps.values() if step.rebased is not None), None),
    )


def _train_one(
    scores: Scores, before: Sequence[str], name: str, standing: Standing, say: Say, run: RunPeriod
) -> tuple[Scores, Step]:
    """Score a period, look whether it has drifted, train on it, and say what is in force after it."""
    stream, model = scores.periods.recipe.stream, standing.model
    assert stream is not None
    scores.of(model, name)  # before it is trained on
    drift = DriftWatch(scores=scores).of(name, model, before, standing.alarm)
    alarm = drift is not None and drift.alarm
    if drift is not None:
        say(f"period {name}: {drift}{', an alarm' if alarm else ''}")
    scores.clear()
    moves = stream.rebase if stream.rebase is not None and stream.rebase.period == name else None
    base = standing.base if moves is None else moves.model
    anew = stream.react == "restart" and (alarm or stream.detect == "none")
    begins = START if anew or (moves is not None and moves.how == "restart") else model
    if moves is not None:
        say(f"period {name}: on {base} from here on, {moves.how}")
        if moves.how == "distil" and not anew:
            if scores.periods.summary(name) is None:
                distil(scores, name, model, base, say, run)
            begins = DISTILLED
    scores = scores.with_base(name, base)
    beginning = None
    if moves is not None:
        beginning = scores.of_beginning(name, begins)
        scores.clear()
    _run_one(scores.periods, name, begins, base, say, run)
    verdict = _verdict(scores, name, model)
    if verdict:
        say(f"period {name}: rolled back to {'the start' if model == START else model}: {verdict}")
    after = Standing(
        model=model if verdict else name,
        base=standing.base if verdict else base,
        alarm=len(before) if alarm else standing.alarm,
    )
    rebased = None if moves is None else _rebased(moves, scores, model, begins, beginning, accepted=not verdict)
    return scores, Step(standing=after, drift=drift, verdict=verdict, rebased=rebased)


def _run_one(periods: PeriodFolders, name: str, begins: str, base: str, say: Say, run: RunPeriod) -> None:
    """Train on a period, or hold one that is finished against what it would be made from."""
    own = periods.recipe_of(name, begins, base)
    if periods.summary(name) is not None:
        periods.require(name, own)
        return
    source = {START: "the start", DISTILLED: "what learned the answers"}.get(begins, begins)
    say(f"period {name}: training, from {source}")
    target = periods.of(name)
    run(own, out=target, resume=(target / "recipe.yaml").exists(), say=say)


def _rebased(
    moves: RebaseConfig, scores: Scores, model: str, begins: str, beginning: float | None, *, accepted: bool
) -> Rebased:
    before, after = (scores.mean(one, moves.period) for one in (model, moves.period))
    scores.clear()
    return Rebased(
        period=moves.period,
        model=moves.model,
        how=moves.how,
        begins=begins,
        answers=count_answers(scores.periods.distilled) if begins == DISTILLED else None,
        before=before,
        beginning=beginning,
        after=after,
        accepted=accepted,
    )


def _verdict(scores: Scores, name: str, model: str) -> str:
    """Why a period's result is not accepted beside the model that is in force; empty where it is."""
    periods = scores.periods
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
        before, after = _general_before(periods, name, model), float(extra["forgotten.after"])
        if not after <= before * (1 + stream.keep.general):
            return f"the perplexity of {periods.recipe.compare.retention_text} is {after:.4g}, and was {before:.4g}"
    return ""


def _general_before(periods: PeriodFolders, name: str, model: str) -> float:
    """The perplexity of the general text with the model that was in force before a period."""
    if periods.base_of(name) == periods.base_of(model):
        found = periods.summary(name)
        assert found is not None
        return float(found["extra"]["forgotten.before"])
    first = next(iter(periods.digests))
    found = periods.summary(first if model == START else model)
    assert found is not None
    return float(found["extra"]["forgotten.before" if model == START else "forgotten.after"])
