"""An experiment: the server's side and the clients' side of one opened recipe, and the batches of its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from lichen.algorithms.scores import MISSING
from lichen.core.contracts.client import Source
from lichen.core.contracts.model import CohortModel
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.data.batches.accumulation import MicroBatches
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.data.batches.shards import EVAL_ROWS, EvalSource, MixedSource, Shard, TrainSource
from lichen.models.cohort import Cohort
from lichen.present.trace import lr_name
from lichen.recipes.assemble.sides.clients import ClientSide, declared, recounted
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of
from lichen.tasks.task import Metric

__all__ = ["Experiment", "lr_name", "metric_of", "values_N"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What a simulation has, and a node: what the server tells everybody, and rows.

    Attributes:
        server: The server's side.
        clients: The clients' side.
    """

    server: ServerSide
    clients: ClientSide

    @classmethod
    def of(cls, recipe: Recipe, model: CohortModel, clients: ClientSide, **server: Any) -> Experiment:
        """An experiment whose clients have declared the rows that they have here.

        Args:
            recipe: The recipe.
            model: The cohort model.
            clients: Their rows.
            server: More of the server's side; by default, it starts from the model's first tensors of seed 0.
        """
        more: dict[str, Any] = {"start": Shared(model.init(0)), "roster": declared(clients)} | server
        return cls(server=ServerSide(recipe=recipe, model=model, **more), clients=clients)

    @property
    def recipe(self) -> Recipe:
        """Known to both sides."""
        return self.server.recipe

    @property
    def model(self) -> CohortModel:
        """Known to both sides."""
        return self.server.model

    @property
    def start(self) -> Shared:
        """Known to both sides."""
        return self.server.start

    def with_server(self, **changes: Any) -> Experiment:
        """With other things on the server's side."""
        return replace(self, server=replace(self.server, **changes))

    def with_rows(self, **changes: Any) -> Experiment:
        """With other things on the clients' side, which declare their rows anew."""
        clients = replace(self.clients, **changes)
        return replace(self.with_server(roster=recounted(self.server.roster, clients)), clients=clients)

    def evaluating(self, shards: Sequence[Shard]) -> Source:
        """Batches that see every row once."""
        most = self.recipe.data.max_length
        return EvalSource(shards, batch_size=EVAL_ROWS, pad=self.server.pad, max_length=most, fixed_width=self._width())

    def _width(self) -> int | None:
        """One width for all where padding is dropped anyway, so that any clients may stand side by side."""
        cohort = innermost(self.model)
        return self.recipe.data.max_length if isinstance(cohort, Cohort) and cohort.packed else None

    def training(
        self, shards: Sequence[Shard], *, batch: int, steps: int | None, epochs: int | None = None, parts: int = 1
    ) -> Source:
        """Batches out of shuffled rows.

        Args:
            shards: Rows by client.
            batch: Rows of a batch, or of each of its parts.
            steps: Batches of every client; None: by epochs.
            epochs: Passes of each client over its rows, in place of steps.
            parts: Micro-batches that a batch is cut into.
        """
        whole = self._sampled(shards, batch=batch * parts, steps=steps or 0, epochs=epochs)
        return whole if parts == 1 else MicroBatches(whole, parts)

    def _sampled(self, shards: Sequence[Shard], *, batch: int, steps: int, epochs: int | None) -> Source:
        own = TrainSource(
            shards,
            batch_size=batch,
            steps=steps,
            epochs=epochs,
            pad=self.server.pad,
            max_length=self.recipe.data.max_length,
            fixed_width=self._width(),
        )
        public, rows = self.server.public, self.clients.auxiliary.rows
        if rows and self.recipe.semi is not None:
            semi = self.recipe.semi
            return ScarceLabels(
                replace(own, shards=rows), unlabelled_rows=semi.batch_size, replacement=semi.kind == "semifl"
            )
        if public is None or self.recipe.teacher is None:
            return own
        return MixedSource(own, public=public, public_rows=self.recipe.teacher.public_batch_size)


def values_N(recipe: Recipe, metrics: Mapping[str, Tensor]) -> Tensor:
    """The recipe's metric for every client, float64; no number for who gave no score in time."""
    value_N = metric_of(recipe).values(metrics)
    return value_N.masked_fill(metrics[MISSING] > 0, math.nan) if MISSING in metrics else value_N


def metric_of(recipe: Recipe) -> Metric:
    """The metric compared, by the recipe or its task."""
    return task_of(recipe.task).metric_of(recipe.compare.metric)
