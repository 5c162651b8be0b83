"""Plans a recipe of several runs, stages or the periods of a stream: each as a run of its own, and the sum.

No stage has been trained when it is planned. A later one is planned with the model that the first one begins with,
which has the shapes of what will be there; its weights do not matter to what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, final

from lichen.present.table import new_table, table_text
from lichen.present.units import bytes_text, joules_text, seconds_text
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.read import Staged

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["StagedPlan", "plan_stages", "plans_table"]


class OnePlan(Protocol):
    """What is expected of one stage."""

    @property
    def seconds(self) -> float: ...

    @property
    def joules(self) -> float | None: ...

    @property
    def problems(self) -> Sequence[Any]: ...

    def as_dict(self) -> dict[str, Any]: ...


P = TypeVar("P", bound=OnePlan)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StagedPlan(Generic[P]):
    """What stages, or the periods of a stream, are expected to cost.

    Attributes:
        name: The recipe's.
        stages: The plan of each, by its name, in order.
        merged: Those that begin with a whole model, which is written beside the stage before.
        key: What they are called together.
        notes: How far the numbers reach.
    """

    name: str
    stages: Mapping[str, P]
    merged: frozenset[str] = frozenset()
    key: str = "stages"
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(one.seconds for one in self.stages.values())

    @property
    def joules(self) -> float | None:
        """Expected energy of all; None where the machine does not say."""
        found = [one.joules for one in self.stages.values() if one.joules is not None]
        return sum(found) if len(found) == len(self.stages) else None

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it: the plan of each stage, and what they sum up to."""
        each = {name: one.as_dict() for name, one in self.stages.items()}
        sent = {way: sum(one["bytes"][way] for one in each.values()) for way in ("up", "down")}
        disk = sum(_disk(one) for one in each.values())
        models = sum(one["memory"]["base"] for name, one in each.items() if name in self.merged)
        drift = [one["drift"]["up"] for one in each.values() if one.get("drift")]
        return {
            "name": self.name,
            "seconds": self.seconds,
            "joules": self.joules,
            "bytes": sent,
            "disk": {"runs": disk, "models": models},
            **({"drift": {"up": sum(drift)}} if drift else {}),
            "notes": self.notes,
            self.key: each,
        }

    def __str__(self) -> str:
        """The table that ``lichen plan`` prints."""
        return table_text(plans_table(self))


def plan_stages(staged: Staged, one: Callable[[Recipe], P], *, say: Callable[[str], None]) -> StagedPlan[P]:
    """Plan every stage.

    Args:
        staged: The stages.
        one: Plans one run.
        say: Called with lines of progress.

    Raises:
        LichenError: what is wrong with a stage, as its run would say it.
    """
    found: dict[str, P] = {}
    for stage in staged.stages:
        say(f"planning stage {stage.name}")
        found[stage.name] = one(_untrained(staged.stages[0].recipe, stage.recipe))
    merged = frozenset(stage.name for stage in staged.stages if stage.begins == "base")
    return StagedPlan(name=staged.name, stages=found, merged=merged)


def _untrained(first: Recipe, recipe: Recipe) -> Recipe:
    """The recipe of a stage with the model that the first one begins with in place of what will be there."""
    if recipe is first:
        return recipe
    begins = {key: getattr(first.model, key) for key in ("name", "scratch", "layers", "random")}
    adapter = recipe.model.adapter.model_copy(update={"init_from": None})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={**begins, "adapter": adapter})})


def _disk(plan: Mapping[str, Any]) -> int:
    """Bytes that a run's folder will hold."""
    return sum(plan["disk"][part] for part in ("private", "shared", "history"))


def _peak(plan: Mapping[str, Any]) -> int:
    """Bytes of memory at most."""
    return int(plan["memory"]["peak"])


def plans_table(plan: StagedPlan[Any]) -> Table:
    """A row for each stage, the sum, and what will not fit."""
    from rich.text import Text

    heads = (plan.name, "time", "up", "down", "peak memory", "disk", "energy")
    table = new_table(None, *heads, numbers=heads[1:])
    whole = plan.as_dict()

    def sent(plans: Mapping[str, Any]) -> list[str]:
        return [bytes_text(plans["bytes"][way]) for way in ("up", "down")]

    def energy(joules: float | None) -> str:
        return "-" if joules is None else joules_text(joules)

    for name, one in whole[plan.key].items():
        memory, disk = bytes_text(_peak(one)), bytes_text(_disk(one))
        table.add_row(Text(name), seconds_text(one["seconds"]), *sent(one), memory, disk, energy(one["joules"]))
    most = max(_peak(one) for one in whole[plan.key].values())
    disk = bytes_text(sum(whole["disk"].values()))
    every = (seconds_text(plan.seconds), *sent(whole), bytes_text(most), disk, energy(plan.joules))
    table.add_row("all", *every, style="bold")
    if plan.merged:
        names = ", ".join(name for name in plan.stages if name in plan.merged)
        what = f"{bytes_text(whole['disk']['models'])} on disk, for {names} to begin with"
        table.add_row("whole models", Text(what), "", "", "", "", "")
    if whole.get("drift", {}).get("up"):
        table.add_row("looking for drift", "", bytes_text(whole["drift"]["up"]), "", "", "", "")
    for name, one in whole[plan.key].items():
        for problem in one["problems"]:
            what = f"{problem['what']}; {problem['change']}"
            table.add_row(Text(f"{name} will not fit"), Text(what), "", "", "", "", "", style="bold red")
    for note in plan.notes:
        table.add_row("note", Text(note), "", "", "", "", "")
    return table
