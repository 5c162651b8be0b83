"""Which piece of a finished run's model a host loads, and what of the run it needs: the recipe and what was learned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.data.sources.catalog import resolve_model
from lichen.models.adapters.kind import Spec
from lichen.models.pieces.carve import spec_within
from lichen.models.pieces.load_piece import load_piece, skeleton
from lichen.models.pieces.partition import numbers_of, part_blocks, spans_of
from lichen.models.pieces.piece_writer import PieceWriter
from lichen.recipes.artifacts.use.finished import load_finished
from lichen.recipes.assemble.model import SCRATCH, spec_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["RunPieces"]


@final
@dataclass(frozen=True)
class RunPieces:
    """A finished chat run, its model dealt out to hosts.

    Args:
        folder: The run's.
        hosts: How many.
    """

    folder: Path
    hosts: int

    @cached_property
    def _finished(self) -> tuple[Recipe, Shared]:
        recipe, tree = load_finished(self.folder)
        return recipe, Shared.of_flat(tree)

    @property
    def recipe(self) -> Recipe:
        """The run's."""
        return self._finished[0]

    @cached_property
    def source(self) -> str | Path:
        """Where the frozen model lies."""
        if self.recipe.model.scratch is not None:
            return self.folder / SCRATCH
        return resolve_model(str(self.recipe.model.name))

    @cached_property
    def structure(self) -> Any:
        """The whole model without its weights."""
        return skeleton(self.source, dtype=self.recipe.model.dtype)

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Blocks of each host.

        Raises:
            LichenError: if there are fewer blocks than hosts.
        """
        try:
            return part_blocks(*numbers_of(self.structure), self.hosts)
        except LichenError as error:
            raise LichenError(error.what, where="--hosts", fix=error.fix) from None

    @cached_property
    def spec(self) -> Spec:
        """What of the whole model was trained."""
        return spec_of(self.recipe, self.structure)

    def refuse(self) -> None:
        """Refuse what cannot be written by hosts, before any of them is started.

        Raises:
            LichenError: for a run that writes nothing, has weights of its own, or a model that cannot be cut.
        """
        model, fix = self.recipe.model, "leave --hosts out"
        for idle, what in (
            (not self.recipe.writes, f"a run of task {self.recipe.task} writes nothing"),
            (model.student is not None, "the run's model is a student"),
            (model.quantize is not None, "hosts load weights as they are, and the run's are quantised"),
            (model.layers is not None or model.random, "the run's model is not its folder's: model.layers, random"),
            (model.adapter.kind != "lora", f"pieces take a lora adapter, and the run's is {model.adapter.kind}"),
        ):
            if idle:
                raise LichenError(what, where="--hosts", fix=fix)
        if self.hosts < 2:
            raise LichenError(f"{self.hosts} are not several", where="--hosts", fix="use 2 or more, or leave it out")
        assert self.parts

    def writer(self, host: int) -> PieceWriter:
        """One host's piece, loaded; no other weight is read."""
        start, stop = spans_of(self.parts)[host]
        piece = load_piece(self.source, start, stop, dtype=self.recipe.model.dtype)
        return PieceWriter(piece, spec_within(self.spec, self.structure, piece), self._finished[1])
