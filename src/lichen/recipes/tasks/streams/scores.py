"""Scores models on the rows of periods, each pair once: what is on the disk is read back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch

from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.recipes.rows.periods import only_period
from lichen.recipes.schema.read import recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.adapt import score_on
from lichen.recipes.tasks.streams.folders import START, PeriodFolders

__all__ = ["Scores", "summed"]

Part = Literal["valid", "test"]

_BARE = {"replay": 0.0, "replay_share": 0.5}
"""Of a period's recipe: no row of the past."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Sums over the clients' rows, by model and period.

    Attributes:
        periods: Where the models lie.
        folder: The stream's folder, which keeps the sums.
        say: Called with lines of progress.
        last: The recipe that was opened last, alone, by its digest: one model at a time is in memory.
    """

    periods: PeriodFolders
    folder: RunFolder
    say: Callable[[str], None]
    last: dict[str, LoadedExperiment] = field(default_factory=dict)

    def with_base(self, period: str, base: str) -> Scores:
        """The same, where the model of a period is made on a base."""
        return replace(self, periods=replace(self.periods, bases={**self.periods.bases, period: base}))

    def of(self, model: str, period: str, part: Part = "test") -> Tree:
        """Sums over each client's rows, ``(N, ...)``, clients in order of their names.

        Args:
            model: A period whose result is scored, or :data:`START`.
            period: Whose rows.
            part: Which of them.
        """
        return self.folder.tree(f"stream.{part}.{model}.on.{period}", lambda: self._score(model, period, part))

    def mean(self, model: str, period: str) -> float | None:
        """The metric's mean over a period's clients; None where none has one."""
        return self._mean(self.of(model, period))

    def _mean(self, sums: Tree) -> float | None:
        found = values_N(self.periods.recipe, sums)
        known = found[~torch.isnan(found)]
        return float(known.mean()) if len(known) else None

    def loss(self, model: str, period: str) -> float:
        """The mean loss over all validation rows of a period."""
        sums = self.of(model, period, "valid")
        return float(sums["loss_sum"].sum() / sums["count"].sum())

    def clear(self) -> None:
        """Let go of what was opened, before something else is."""
        self.last.clear()

    def _score(self, model: str, period: str, part: Part) -> Tree:
        loaded = self.open(period, self.periods.base_of(model))
        shared = loaded.experiment.start if model == START else self.periods.tensors(model)
        self.say(f"{period}: scoring the model {'at the start' if model == START else f'of {model}'}")
        return self._of_part(loaded, shared, part)

    def of_beginning(self, period: str, model: str) -> float | None:
        """The metric's mean over a period's clients, of what its run begins from, where that is no model yet.

        Args:
            period: Its name.
            model: What its adapter begins from: that of a period, ``DISTILLED``, or :data:`START`.
        """

        def score() -> Tree:
            own = only_period(self.periods.recipe_of(period, model, self.periods.base_of(period)), period, **_BARE)
            self.say(f"{period}: scoring the model that it begins from")
            loaded = self._load(own)
            return self._of_part(loaded, loaded.experiment.start, "test")

        return self._mean(self.folder.tree(f"stream.test.beginning.on.{period}", score))

    def _of_part(self, loaded: LoadedExperiment, shared: Shared, part: Part) -> Tree:
        clients = loaded.experiment.clients
        rows = clients.test if part == "test" else clients.valid
        return score_on(loaded.experiment, rows, shared, self.folder.path, self.folder.ranks)

    def open(self, period: str, base: str) -> LoadedExperiment:
        """The rows of one period, with nothing of the past among them, and a base."""
        return self._load(on_base(only_period(self.periods.recipe, period, **_BARE), base))

    def _load(self, recipe: Recipe) -> LoadedExperiment:
        key = recipe_sha256(recipe)
        if key not in self.last:
            self.clear()
            self.last[key] = open_recipe(recipe)
        return self.last[key]


def summed(sums: Sequence[tuple[Sequence[str], Tree]], names: Sequence[str]) -> Tree:
    """Sums of several periods together, ``(N, ...)`` for the clients of these names.

    Args:
        sums: Of each period its clients and their sums.
        names: All clients, in order.
    """
    row = {name: at for at, name in enumerate(names)}
    out: Tree = {}
    for clients, tree in sums:
        index = torch.tensor([row[name] for name in clients])
        for key, x_M in tree.items():
            total = out.setdefault(key, torch.zeros(len(names), *x_M.shape[1:], dtype=x_M.dtype))
            total.index_add_(0, index, x_M)
    return out
