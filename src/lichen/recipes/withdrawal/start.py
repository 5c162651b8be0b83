"""Where a replay may start: the last state of a run that does not depend on one client.

A client matters in more ways than by the messages that were averaged. It may have validated, so that the best round and
the rate were chosen by its rows, too; the server may know what it was sent; help, heads in closed form and a model's
own words may have been made of its rows before the first round. Where the state of a round may depend on it, the start
is before that round; what cannot be told apart starts at round 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from lichen.core.files.journal import RoundEntry
from lichen.present.trace import event_of
from lichen.recipes.assemble.sides.personal import norms_of, trains_own
from lichen.recipes.assemble.workload import trial_rounds
from lichen.recipes.schema.recipe import Recipe

__all__ = ["Start", "everywhere", "start_of"]

_ALWAYS: tuple[tuple[Callable[[Recipe], object], str], ...] = (
    (lambda r: not r.engine.history, "the run kept no state but its last two (engine.history)"),
    (lambda r: r.has_help or r.starts_at_server, "what all began from was made of everybody's rows"),
    (lambda r: r.model.scratch is not None, "the model's words were taken from everybody's rows"),
    (lambda r: r.wire.down, "the server's view of each client goes on from round to round (wire.down)"),
    (lambda r: r.federation.schedule.kind == "buffered", "jobs of several rounds are on their way at once"),
    (lambda r: r.value is not None or r.federation.reward != "none", "every round is valued by all"),
    (lambda r: r.federation.fair in ("minmax", "tilted"), "weights follow everybody's losses (federation.fair)"),
    (
        lambda r: r.personal is not None or trains_own(r) or r.aggregation.local_params or norms_of(r),
        "clients keep tensors of their own of the best round",
    ),
    (lambda r: r.masked is not None, "under masks a round is known by its sum alone"),
)
"""What makes every round depend on every client, and how that is said."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where the rounds of one learning rate begin anew.

    Attributes:
        round: Rounds that are copied.
        judges: Whether the client validated, so that these are judged again by the others.
        why: Why not later.
    """

    round: int
    judges: bool
    why: str


def everywhere(recipe: Recipe) -> str:
    """Why every round depends on every client; empty where that is not so."""
    return next((why for applies, why in _ALWAYS if applies(recipe)), "")


def start_of(
    recipe: Recipe, client: int, entries: Sequence[RoundEntry], there: Sequence[int], *, judges: bool
) -> Start:
    """The last round whose state the replay can begin with.

    Args:
        recipe: Of the run.
        client: Who is forgotten.
        entries: The column's lines of the journal, by round.
        there: Rounds whose states are there.
        judges: Whether the client validates.
    """
    if why := everywhere(recipe):
        return Start(round=0, judges=judges, why=why)
    if not there:
        return Start(round=0, judges=judges, why="no state of an earlier round is there")
    most, why = trial_rounds(recipe, recipe.federation.rounds), "the rate is chosen after it"
    if len(recipe.optimizer.lr) == 1:
        why = "the client was in no round at all"
    for entry in entries:
        report = event_of(entry.traced.encode()).report if entry.traced else None
        if report is None:
            return Start(round=0, judges=judges, why="the journal lacks lines of the trace")
        if client in report.clients and entry.round - 1 < most:
            most, why = entry.round - 1, f"the client was invited to round {entry.round}"
            break
        others = set(report.attendance.refused) - {"absent"} or report.attendance.missing
        if judges and others and entry.round - 1 < most:
            most, why = entry.round - 1, f"somebody else did not answer in round {entry.round}"
            break
    if judges:  # each round is judged anew, for which its tensors must be there
        every = recipe.engine.history
        if every != 1:
            why = "the client validated, and not every state is there by which rounds could be judged without it"
            return Start(round=0, judges=True, why=f"{why}: set engine.history to 1")
        whole = next((at for at in range(1, most + 1) if at not in there), most + 1) - 1
        return Start(round=whole, judges=True, why=why if whole == most else f"the state of round {whole + 1} is gone")
    found = max((at for at in there if at <= most), default=0)
    return Start(round=found, judges=False, why=why)
