"""Writes and reads ``contributions.json``: what each client contributed in each round, and in all that were kept.

The rounds are those of the federated column at the learning rate that was chosen. The model of a run is that of its
best round, so that a client's total is the sum over valued rounds up to that one; rounds after it count for nothing.
All numbers follow from the recipe and the rows: what valuing took in seconds stands in the trace.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.contracts.value import RoundValue
from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.files.manifest import MANIFEST, check
from lichen.present.trace import read_trace
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.schema.recipe import Recipe

__all__ = ["CONTRIBUTIONS", "Contributions", "contributions_of", "read_contributions"]

CONTRIBUTIONS = "contributions.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Contributions:
    """What the clients of a finished run contributed, in units of the loss.

    Attributes:
        about: The recipe's section ``value``.
        column: Of the rounds, as the record names it.
        until: The round whose model was kept.
        clients: All clients of the run, in roster order.
        rounds: Values by round, of those that were valued.
    """

    about: Mapping[str, Any]
    column: str
    until: int
    clients: tuple[str, ...]
    rounds: Mapping[int, RoundValue]

    @property
    def private(self) -> bool:
        """Whether each client keeps its values, so that here only their sums are known."""
        return any(value.total is not None for value in self.rounds.values())

    @property
    def totals(self) -> tuple[float, ...]:
        """Each client's over the rounds up to the kept one, exact sums; 0 for who never came, none at all at home."""
        counted = [value.value for at, value in self.rounds.items() if at <= self.until]
        if self.private:
            return ()
        return tuple(math.fsum(value.get(client, 0.0) for value in counted) for client in range(len(self.clients)))

    @property
    def sum(self) -> float:
        """What all values of the counted rounds add up to."""
        return math.fsum(value.sum for at, value in self.rounds.items() if at <= self.until)

    @property
    def gap(self) -> float | None:
        """What the values of the counted rounds leave out of what these gained; None where that is not known."""
        gaps = [value.gap for at, value in self.rounds.items() if at <= self.until]
        known = [gap for gap in gaps if gap is not None]
        return math.fsum(known) if len(known) == len(gaps) else None

    @property
    def evaluations(self) -> int:
        """Coalitions that were judged, in all valued rounds."""
        return sum(value.evaluations for value in self.rounds.values())

    def summary(self) -> dict[str, float | str | None]:
        """Lines of a run's summary."""
        kind, of, rows, every = (self.about[key] for key in ("kind", "of", "rows", "every"))
        denominator = "" if kind == "first" else f" of {of}"
        each = "round" if every == 1 else f"{every} rounds"
        apart = "; each client alone knows its own" if self.private else ""
        lines: dict[str, float | str | None] = {
            "value": f"{kind}{denominator}, {rows} rows, each {each}, up to round {self.until}{apart}",
            "value.sum": self.sum,
            "value.gap": self.gap,
            "value.evaluations": float(self.evaluations),
            "value.negative": float(sum(total < 0 for total in self.totals)),
        }
        unknown = {"value.negative"} if self.private else set()
        return {name: x for name, x in lines.items() if x is not None and name not in unknown}

    def write(self, folder: Path) -> None:
        """Write the file: a line for each total, each round, and each client of each round."""
        hidden = self.private
        totals: list[dict[str, Any]] = [{"client": name} for name in self.clients]
        for place, total in enumerate(self.totals):
            came = sum(place in one.value for one in self.rounds.values())
            totals[place] |= {"rounds": came, "value": total}
        rounds = [
            {"round": at, "before": x.before, "after": x.after, "gap": x.gap, "evaluations": x.evaluations}
            | ({"total": x.total} if hidden else {})
            for at, x in self.rounds.items()
        ]
        lines = [
            {"round": at, "client": self.clients[client], "value": value}
            for at, x in self.rounds.items()
            for client, value in x.value.items()
        ]
        head = {**self.about, "column": self.column, "until": self.until, "gap": self.gap}
        parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        for name, some in (("totals", totals), ("rounds", rounds), ("lines", lines)):
            inside = ",\n  ".join(json.dumps(one, allow_nan=False) for one in some)
            parts.append(f' "{name}": [\n  {inside}\n ]')
        write_atomic(folder / CONTRIBUTIONS, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def contributions_of(recipe: Recipe, folder: Path, column: Column, clients: Sequence[str]) -> Contributions | None:
    """What a run's trace says of it; None where the recipe asks for no values.

    Args:
        recipe: The run's.
        folder: Its folder.
        column: The federated one.
        clients: Their names, in roster order.
    """
    lr = column.lr
    if recipe.value is None or lr is None:
        return None
    grid = lr_name(lr)
    rounds = {
        event.report.round: event.report.value
        for event in read_trace(folder)
        if (event.column, event.grid) == ("federated", grid) and event.report.value is not None
    }
    return Contributions(
        about=recipe.value.model_dump(),
        column=f"federated/{grid}",
        until=column.best_round,
        clients=tuple(clients),
        rounds=rounds,
    )


def read_contributions(folder: Path) -> Contributions:
    """What a finished run's file says.

    Raises:
        LichenError: if there is none, or it is damaged.
    """
    path = folder / CONTRIBUTIONS
    fix = f"write it anew: lichen run --resume {folder}"
    if not path.is_file():
        whose = "no folder of a run" if not (folder / "recipe.yaml").is_file() else "has no contributions"
        raise LichenError(f"{whose}: {CONTRIBUTIONS} is missing", where=str(folder), fix="run a recipe with `value`")
    check(folder, MANIFEST, (CONTRIBUTIONS,), fix=fix)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        names = tuple(str(one["client"]) for one in body["totals"])
        place = {name: client for client, name in enumerate(names)}
        found = Contributions(
            about={key: body[key] for key in ("kind", "of", "rows", "every")},
            column=str(body["column"]),
            until=int(body["until"]),
            clients=names,
            rounds={int(one["round"]): _round(one, body["lines"], place) for one in body["rounds"]},
        )
        if [one["value"] for one in body["totals"] if "value" in one] != list(found.totals):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise LichenError("is damaged", where=str(path), fix=fix) from None
    return found


def _round(about: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], place: Mapping[str, int]) -> RoundValue:
    mine = [[place[one["client"]], one["value"]] for one in lines if one["round"] == about["round"]]
    return RoundValue.load({**about, "value": mine})
