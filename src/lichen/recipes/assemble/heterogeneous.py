"""Assigns student architectures to clients, by turns or by memory.

Everything by architecture goes by its name, ``<arch>-<width>``. Clients get theirs in turns, or, where the recipe
says what memory they have, the one with most parameters that they can train (:mod:`lichen.models.students.family`).

References:
    Daliang Li and Junpu Wang. "FedMD: Heterogenous Federated Learning via Model Distillation." NeurIPS
    Workshop on Federated Learning 2019. https://arxiv.org/abs/1910.03581
    Tao Lin, Lingjing Kong, Sebastian U. Stich and Martin Jaggi. "Ensemble Distillation for Robust Model
    Fusion in Federated Learning." NeurIPS 2020. https://arxiv.org/abs/2006.07242

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from lichen.algorithms.exchange import Architectures
from lichen.clients.distillation.private_models import with_answer_rows
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import Shard, TrainSource
from lichen.models.losses import answer_settings
from lichen.models.students.family import Optimizer, family, largest_fitting
from lichen.models.students.student import Student as Model
from lichen.recipes.assemble.capacity import GIB
from lichen.recipes.assemble.experiment import Experiment
from lichen.recipes.assemble.model import make_student, start_of
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.schema.recipe import ExchangeConfig, Recipe, StudentConfig

__all__ = ["HeterogeneousClients", "open_heterogeneous", "own_rows", "public_rows"]

STEPPERS: Mapping[str, Optimizer] = {"adamw": "adamw", "sgd": "sgd"}


def name_of(student: StudentConfig) -> str:
    """How an architecture is called.

    >>> name_of(StudentConfig(kind="text-cnn", width=16))
    'text-cnn-16'
    """
    return f"{student.kind}-{student.width}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HeterogeneousClients:
    """The clients of each architecture, and what they work with.

    Attributes:
        recipe: The recipe.
        exchange: Its section.
        architectures: The clients of each architecture that has some.
        students: What each is in the recipe.
        experiments: What each works with, its model among it.
        public: The public rows.
    """

    recipe: Recipe
    exchange: ExchangeConfig
    architectures: Architectures
    students: Mapping[str, StudentConfig]
    experiments: Mapping[str, Experiment]
    public: Shard

    @property
    def count(self) -> int:
        """Clients."""
        return sum(map(len, self.architectures.values()))

    @property
    def server(self) -> ServerSide:
        """The server's side, with one of the models; what it says of the clients is the same with all of them."""
        return next(iter(self.experiments.values())).server

    @property
    def fused(self) -> bool:
        """Whether weights are averaged within an architecture; else clients' models stay with them."""
        return self.exchange.kind == "feddf"

    def settings(self) -> Shared:
        """How answers are learned from."""
        return Shared(frozen=answer_settings(threshold=self.exchange.min_confidence or None))


def own_rows(heterogeneous: HeterogeneousClients, arch: str, steps: int) -> TrainSource:
    """The clients' own rows, so many steps a round."""
    experiment, fed = heterogeneous.experiments[arch], heterogeneous.recipe.federation
    most = heterogeneous.recipe.data.max_length
    rows, pad = experiment.clients.train, experiment.server.pad
    return TrainSource(rows, batch_size=fed.batch_size, steps=steps, pad=pad, max_length=most)


def public_rows(heterogeneous: HeterogeneousClients, own: TrainSource, clients: Sequence[int]) -> TrainSource:
    """The answered public rows for these clients, the steps of one round."""
    section = heterogeneous.exchange
    return replace(
        own,
        shards=dict.fromkeys(clients, with_answer_rows(heterogeneous.public)),
        batch_size=section.public_batch_size,
        steps=section.digest(heterogeneous.recipe.federation.fixed_steps),
    )


def open_heterogeneous(recipe: Recipe, say: Callable[[str], None]) -> tuple[LoadedExperiment, HeterogeneousClients]:
    """The recipe opened, and its students dealt out.

    Raises:
        LichenError: whatever does not fit, by its key.
    """
    section, every = recipe.exchange, {name_of(student): student for student in recipe.model.students}
    assert section is not None
    single = {name: _single(recipe, student) for name, student in every.items()}
    loaded = open_recipe(next(iter(single.values())), say=say, report_counts=True)
    size = len(loaded.vocabulary) if loaded.vocabulary else len(loaded.tokenizer) if loaded.tokenizer else 0
    first, classes, public = loaded.experiment.clients.train[0], loaded.classes, loaded.public
    assert public is not None
    models = {
        name: make_student(recipe, first, classes, vocabulary=size, section=student) for name, student in every.items()
    }
    experiments = {
        name: loaded.experiment.with_server(recipe=single[name], model=model, start=Shared(start_of(recipe, model)))
        for name, model in models.items()
    }
    count = len(loaded.experiment.server.roster)
    whole = HeterogeneousClients(
        recipe=recipe,
        exchange=section,
        architectures={name: tuple(range(count)) for name in every},
        students=every,
        experiments=experiments,
        public=public,
    )
    turns = [name_of(student) for student in recipe.model.students]
    given = _by_memory(whole, models) if recipe.federation.memory else [turns[c % len(turns)] for c in range(count)]
    architectures = {name: some for name in every if (some := tuple(c for c, of in enumerate(given) if of == name))}
    say("; ".join(f"{len(some)} clients have a {name}" for name, some in architectures.items()))
    experiments = {name: experiment for name, experiment in experiments.items() if name in architectures}
    return loaded, replace(whole, architectures=architectures, experiments=experiments)


def _single(recipe: Recipe, student: StudentConfig) -> Recipe:
    """The recipe as if all clients had this student."""
    model = recipe.model.model_copy(update={"student": student})
    federation = recipe.federation.model_copy(update={"memory": None})
    return recipe.model_copy(update={"model": model, "federation": federation})


def _by_memory(heterogeneous: HeterogeneousClients, models: Mapping[str, Model]) -> list[str]:
    """Every client's architecture: the largest that its memory can train, on its own rows and on public ones."""
    recipe = heterogeneous.recipe
    memory, opt = recipe.federation.memory or (), recipe.optimizer
    stepper: Optimizer = "momentum" if opt.name == "sgd" and opt.momentum else STEPPERS[opt.name]
    known: dict[object, str] = {}
    out: list[str] = []
    for client in range(len(heterogeneous.server.roster)):
        batch, bytes_here = _widest(heterogeneous, client), int(memory[client % len(memory)] * GIB)
        key = (bytes_here, tuple(sorted((name, tuple(x.shape)) for name, x in batch.items())))
        if key not in known:
            try:
                members = family(models, models.__getitem__, batch, optimizer=stepper)
                known[key] = largest_fitting(bytes_here, members).config
            except LichenError as error:
                raise LichenError(error.what, where="federation.memory", fix=error.fix) from None
        out.append(known[key])
    return out


def _widest(heterogeneous: HeterogeneousClients, client: int) -> Batch:
    """The larger of a client's batches: of its own rows, and of public ones where it learns from them."""
    mine = own_rows(heterogeneous, next(iter(heterogeneous.experiments)), 1)
    sources = [mine] if heterogeneous.fused else [mine, public_rows(heterogeneous, mine, (client,))]
    found = [batch for source in sources if (batch := next(iter(source.batches((client,), 0)), None)) is not None]
    if not found:
        raise LichenError(f"client {client} has no rows to train on", where="data", fix="raise data.min_rows")
    return max(found, key=lambda batch: sum(x.numel() for x in batch.values()))
