"""The context of an experiment: model, initial parameters, and every client's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from torch import Tensor

from lichen.core.contracts import CohortModel, Source
from lichen.core.tree import Tree
from lichen.data.batches.accumulation import MicroBatches
from lichen.data.batches.augment import Views
from lichen.data.batches.scarce_labels import ScarceLabels
from lichen.data.batches.shards import EvalSource, MixedSource, Shard, TrainSource
from lichen.models.cohort import Cohort
from lichen.present.trace import lr_name
from lichen.recipes.schema.recipe import Recipe
from lichen.server.lowrank.submodel import Capacity
from lichen.tasks.registry import task_of
from lichen.tasks.task import Metric

__all__ = [
    "Auxiliary",
    "Experiment",
    "lr_name",
    "metric_of",
    "participants",
    "rows_per_round",
    "steps_per_round",
    "values_N",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Auxiliary:
    """What clients learn from beside their labels and a teacher's public answers.

    Attributes:
        rows: All rows of the clients, those without a label among them, one shard a client; none: labelled ones alone.
        views: Weak and strong views of the unlabelled ones.
        answers: ``answers.*`` of a teacher to them, which never leave.
        judge: The clients' rows to judge a teacher by; None: it is taken at its word.
        teacher_label_M: The class it names for each of those.
        server: Labelled rows the server itself trains on between rounds; None: it does not.
    """

    rows: tuple[Shard, ...] = ()
    views: Views | None = None
    answers: Tree = field(default_factory=dict)
    judge: Source | None = None
    teacher_label_M: Tensor | None = None
    server: Shard | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What every column works with.

    Attributes:
        recipe: The recipe.
        model: The cohort model.
        start: The shared tensors before the first round.
        train: One shard a client.
        valid: One shard a client, to choose learning rate and round by.
        test: One shard a client, only scored.
        pad: Padding token of text shards.
        public: Texts a teacher has answered, learned from beside the clients' own rows.
        capacity: What each client can train; None where all train everything.
        auxiliary: What clients learn from beside their labels and a teacher's public answers.
    """

    recipe: Recipe
    model: CohortModel
    start: Tree
    train: tuple[Shard, ...]
    valid: tuple[Shard, ...]
    test: tuple[Shard, ...]
    pad: int
    public: Shard | None = None
    capacity: Capacity | None = None
    auxiliary: Auxiliary = field(default_factory=Auxiliary)

    def evaluating(self, shards: Sequence[Shard]) -> Source:
        """Batches that see every row once."""
        most = self.recipe.data.max_length
        return EvalSource(shards, batch_size=16, pad=self.pad, max_length=most, fixed_width=self._width())

    def _width(self) -> int | None:
        """One width for all where padding is dropped anyway, so that any clients may stand side by side."""
        return self.recipe.data.max_length if isinstance(self.model, Cohort) and self.model.packed else None

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
            pad=self.pad,
            max_length=self.recipe.data.max_length,
            fixed_width=self._width(),
        )
        if self.auxiliary.rows and self.recipe.semi is not None:
            return ScarceLabels(replace(own, shards=self.auxiliary.rows), unlabelled_rows=self.recipe.semi.batch_size)
        if self.public is None or self.recipe.teacher is None:
            return own
        return MixedSource(own, public=self.public, public_rows=self.recipe.teacher.public_batch_size)


def values_N(recipe: Recipe, metrics: Mapping[str, Tensor]) -> Tensor:
    """The recipe's metric for every client, float64."""
    return metric_of(recipe).values(metrics)


def metric_of(recipe: Recipe) -> Metric:
    """The metric compared, by the recipe or its task."""
    return task_of(recipe.task).metric_of(recipe.compare.metric)


def steps_per_round(experiment: Experiment) -> float:
    """Local steps of a client in a round; with epochs, on average over clients."""
    fed = experiment.recipe.federation
    if fed.local_epochs is None:
        return fed.fixed_steps
    rows = fed.batch_size * fed.gradient_accumulation_steps
    return fed.local_epochs * sum(-(-shard.size // rows) for shard in experiment.train) / len(experiment.train)


def rows_per_round(experiment: Experiment) -> float:
    """Rows a client trains on in a round; with epochs, on average over clients."""
    fed = experiment.recipe.federation
    if fed.local_epochs is None:
        return fed.fixed_steps * fed.batch_size * fed.gradient_accumulation_steps
    return fed.local_epochs * sum(shard.size for shard in experiment.train) / len(experiment.train)


def participants(experiment: Experiment) -> int:
    """Clients expected in a round."""
    return min(experiment.recipe.federation.clients_per_round or len(experiment.train), len(experiment.train))
