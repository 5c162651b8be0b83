"""Plans a recipe: seconds, bytes, memory, disk, operations, energy.

The recipe is opened exactly as a run opens it. A few real blocks are then trained and evaluated in a folder
that is removed again, and what was measured is multiplied by what can be counted: who is invited to which round,
how many tokens their batches hold, how often everybody validates (:mod:`lichen.recipes.plan.workload`). Bytes are those
of real jobs and messages. Nothing of a plan changes the run that follows.

>>> plan("digits").expected.bytes.up  # doctest: +SKIP
4200640
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.models.loading.dtypes import slow_dtype
from lichen.present.measured.energy import Meter, counters
from lichen.present.planned import plan_table
from lichen.present.table import table_text
from lichen.recipes.launch import require_processes
from lichen.recipes.plan.adapt import estimate_adapt
from lichen.recipes.plan.estimate import Estimate, Problem, problems
from lichen.recipes.plan.features import estimate_with_teacher
from lichen.recipes.plan.memory import MemoryMeter
from lichen.recipes.plan.periods import drift_costs, periods_ahead, stream_notes
from lichen.recipes.plan.pieces.host_costs import estimate_hosts
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.plans import StagedPlan, plan_stages
from lichen.recipes.stages.read import Staged, read_page
from lichen.tasks.registry import task_of

__all__ = ["Plan", "plan"]

SECONDS = 2.0
"""About how long each kind of work is timed."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is expected to cost.

    Attributes:
        name: The recipe's.
        task: Its task.
        engine: Where clients run.
        device: Where tensors are.
        expected: All that was found out.
        seconds: Of the whole run.
        joules: Expected energy; None where the machine does not say.
        problems: What will not fit, and what to change.
    """

    name: str
    task: str
    engine: str
    device: str
    expected: Estimate
    seconds: float
    joules: float | None
    problems: tuple[Problem, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it, one level flatter."""
        whole = asdict(self)
        expected = whole.pop("expected")
        return {**whole, **expected}

    def __str__(self) -> str:
        """The table that ``lichen plan`` prints."""
        return table_text(plan_table(self.as_dict()))


def plan(
    recipe: Recipe | Staged | Mapping[str, Any] | str | Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    seconds: float = SECONDS,
) -> Plan | StagedPlan[Plan]:
    """Find out what a recipe will cost on this machine; takes as long as loading it and a few blocks.

    Args:
        recipe: A recipe, its mapping, a YAML file, or a gallery name.
        say: Called with lines of progress.
        seconds: About how long each kind of work is timed; longer is steadier.

    Returns:
        The plan; of a recipe of several stages, or of a stream of periods, the plans of all.

    Raises:
        LichenError: what is wrong with the recipe or its files, as the run would say it.
    """
    recipe = recipe if isinstance(recipe, Recipe | Staged) else read_page(recipe)
    if isinstance(recipe, Staged):
        return plan_stages(recipe, partial(_plan, say=say, seconds=seconds), say=say)
    if recipe.streams:
        return _plan_stream(recipe, say=say, seconds=seconds)
    return _plan(recipe, say=say, seconds=seconds)


LEAST = 0.2
"""Seconds for which each kind of work of a period is timed at least."""


def _plan_stream(recipe: Recipe, *, say: Callable[[str], None], seconds: float) -> StagedPlan[Plan]:
    """Each period as a run of its own, with what is scored and looked for beside it."""
    ahead, found = periods_ahead(recipe, say), dict[str, Plan]()
    for period in ahead:
        say(f"planning period {period.name}")
        task = partial(estimate_adapt, extra=period.work)
        found[period.name] = _plan(period.recipe, say=say, seconds=max(LEAST, seconds / len(ahead)), task=task)
    with tempfile.TemporaryDirectory(prefix="lichen-plan-") as folder:
        costs = drift_costs(recipe, ahead, Path(folder), say)
    for name, drift in costs.items():
        one = found[name]
        columns = {**one.expected.columns, "drift": drift.cost}
        expected = replace(one.expected, columns=columns, drift=drift.as_dict())
        joules = None if one.joules is None else one.joules / one.seconds * (one.seconds + drift.cost.seconds)
        found[name] = replace(one, expected=expected, seconds=one.seconds + drift.cost.seconds, joules=joules)
    return StagedPlan(name=recipe.name, stages=found, key="periods", notes=stream_notes(recipe))


def _plan(
    recipe: Recipe,
    *,
    say: Callable[[str], None],
    seconds: float,
    task: Callable[..., Estimate] | None = None,
) -> Plan:
    require_processes(recipe)
    if recipe.federation.absent:  # whose rows are dealt out all the same, and whose numbers stay
        say("federation.absent: what absent clients would have cost is counted, so that this is the most")
        recipe = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"absent": ()})})
    if slow := slow_dtype(recipe.model.dtype, recipe.model.device):
        say(f"model.dtype: {slow}")
    if recipe.exchange is not None:
        raise LichenError(
            "an exchange among unequal students cannot be planned yet",
            where="exchange",
            fix="run it for a round or two and multiply: lichen run RECIPE -s federation.rounds=2",
        )
    has_teacher = recipe.teacher is not None and not recipe.writes
    if task is None and recipe.pipeline is not None:
        task = estimate_hosts
    elif task is None:
        task = estimate_with_teacher if has_teacher else task_of(recipe.task).procedure.load("plan")
    device = recipe.model.device
    with tempfile.TemporaryDirectory(prefix="lichen-plan-") as folder, Meter(counters(device)) as meter:
        start_time = time.perf_counter()
        found = task(recipe, Path(folder), MemoryMeter(device), say, seconds)
        spent, joules = time.perf_counter() - start_time, meter.joules()
    if slow:
        found = replace(found, notes=(*found.notes, f"model.dtype: {slow}"))
    whole = found.start + sum(cost.seconds for cost in found.columns.values())
    return Plan(
        name=recipe.name,
        task=recipe.task,
        engine=recipe.engine.name,
        device=device,
        expected=found,
        seconds=whole,
        joules=None if joules is None else joules / spent * whole,
        problems=problems(recipe, found.memory, found.disk),
    )
