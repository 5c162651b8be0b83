"""The folders of a stream's periods: each is an ordinary run's, and what is finished there is never made again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder, write_atomic
from lichen.core.files.manifest import MANIFEST as SEAL
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.inputs import rows_digest
from lichen.recipes.artifacts.verify import MANIFEST
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.rows.periods import only_period
from lichen.recipes.schema.read import MOVABLE, different_keys, recipe_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["DISTILLED", "START", "PeriodFolders"]

START = "start"
"""The model that the first period begins from, among the names of periods."""

DISTILLED = "distilled"
"""What learned the answers of the model in force before another base, among them, and its folder beside theirs."""

_FINAL = "state/final.safetensors"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodFolders:
    """Where the runs of a stream's periods lie.

    Attributes:
        recipe: The stream's.
        root: The folder of all of them.
        digests: Of the rows of each period, the earliest first.
        bases: The base of each model that is known to be on another one than the recipe's.
    """

    recipe: Recipe
    root: Path
    digests: Mapping[str, str]
    bases: Mapping[str, str] = field(default_factory=dict)

    def of(self, period: str) -> Path:
        """The run's folder of one period."""
        return self.root / period

    @property
    def distilled(self) -> Path:
        """The folder of the run that learned the answers of a model on the base before."""
        return self.root.parent / DISTILLED

    def base_of(self, model: str) -> str:
        """The base that a model was made on.

        Args:
            model: The period that it came out of, or :data:`START`.
        """
        return self.bases.get(model, str(self.recipe.model.name))

    def recipe_of(self, period: str, model: str, base: str) -> Recipe:
        """What a period's run is: its rows, and those of the past, from the model that is in force.

        Args:
            period: Its name.
            model: The period that the model came out of, :data:`START` or :data:`DISTILLED`.
            base: What the period is trained on.
        """
        first = period == next(iter(self.digests))
        own = only_period(self.recipe, period, **({"replay": 0.0, "replay_share": 0.5} if first else {}))
        own = on_base(own.model_copy(update={"name": f"{self.recipe.name} {period}"}), base)
        if model == START:
            return own
        source = self.distilled if model == DISTILLED else self.of(model)
        adapter = own.model.adapter.model_copy(update={"init_from": str((source / "adapter").absolute())})
        return own.model_copy(update={"model": own.model.model_copy(update={"adapter": adapter})})

    def summary(self, period: str) -> dict[str, Any] | None:
        """What a period's run ended with; None if it has not, which its list of files, written last, tells.

        Raises:
            LichenError: if it is damaged.
        """
        return read_summary(self.of(period)) if (self.of(period) / SEAL).exists() else None

    def require(self, period: str, recipe: Recipe) -> None:
        """Hold a finished period against what it would be made from today.

        Raises:
            LichenError: if that is something else.
        """
        own, where = recipe_of(self.of(period)), str(self.of(period))
        changed = different_keys(own, recipe)
        if others := [key for key in changed if key not in MOVABLE]:
            raise LichenError(
                f"was made by another recipe: {', '.join(others[:6])}", where=where, fix="put the folder of then back"
            )
        if rows_digest(self.of(period)) != self.digests[period]:
            raise LichenError(
                f"was trained on other rows than {self.recipe.data.name} has of this period now",
                where=where,
                fix="put the rows of then back; new rows are of later periods, or start a new run: lichen run RECIPE",
            )

    def require_order(self) -> None:
        """Refuse rows that came too late: of a period before one that is finished, or of none that is there now.

        Raises:
            LichenError: naming the period.
        """
        done = [path.name for path in sorted(self.root.glob("*")) if (path / SEAL).exists()]
        names = list(self.digests)
        if gone := [name for name in done if name not in names]:
            raise LichenError(
                f"has no row of {gone[0]} now, which was trained on", where=self.recipe.data.name, fix="put it back"
            )
        last = max((names.index(name) for name in done), default=0)
        if late := [name for name in names[:last] if name not in done]:
            raise LichenError(
                f"has rows of {late[0]} now, which is before {names[last]}, and that was trained on",
                where=self.recipe.data.name,
                fix="give these rows a later date, or start a new run: lichen run RECIPE",
            )

    def tensors(self, period: str) -> Shared:
        """What a period's run ended with."""
        return Shared.of_flat(load_tree(self.of(period) / _FINAL)[0])

    def hand_on(self, period: str, target: Path) -> None:
        """Copy what a period ended with to where a run's result lies.

        Args:
            period: Whose model is in force.
            target: The stream's folder.
        """
        source = self.of(period)
        with whole_folder(target / "adapter") as draft:
            for file in sorted((source / "adapter").iterdir()):
                if file.is_file() and file.name not in (MANIFEST, "README.md"):
                    shutil.copyfile(file, draft / file.name)
        for name in (_FINAL, "classes.json"):
            if (source / name).exists():
                write_atomic(target / name, (source / name).read_bytes())
