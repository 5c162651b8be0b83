"""Results of an exchange: ensemble column, numbers by architecture, saved models.

Legend: M test rows of all clients, K classes, N clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch

from lichen.algorithms.exchange import by_architecture
from lichen.core import tree as trees
from lichen.core.collecting.collect import drain
from lichen.core.contracts.algorithm import ServerState
from lichen.core.message import Job
from lichen.core.store import ClientStore, save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.batches.shards import ArrayShard, Shard, pooled
from lichen.recipes.assemble.column import Column
from lichen.recipes.assemble.experiment import values_N
from lichen.recipes.assemble.heterogeneous import HeterogeneousClients
from lichen.recipes.assemble.heterogeneous_parts import engine_of, prediction_tasks
from lichen.recipes.assemble.model import STUDENT_TOKENIZER
from lichen.recipes.assemble.open import LoadedExperiment
from lichen.recipes.assemble.run_folder import RunFolder
from lichen.server.knowledge.ensemble import Ensemble

__all__ = ["Trained", "ensemble_column", "metrics_by_arch", "public_bytes", "save_models"]

Models = Callable[[str], Shared]
"""The tensors a job brings, by kind."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The federated column, and what it takes to ask its models more.

    Attributes:
        column: The column.
        state: The server's state after the last round.
        store: The clients' private state.
        models: The tensors of each kind that a job brings; nothing where clients hold their own.
    """

    column: Column
    state: ServerState
    store: ClientStore
    models: Models


def ensemble_column(
    loaded: LoadedExperiment, heterogeneous: HeterogeneousClients, trained: Trained, folder: RunFolder
) -> Column:
    """What all models say of each test row together, whoever's it is; no part of the exchange."""
    recipe, test, classes = heterogeneous.recipe, loaded.experiment.clients.test, len(loaded.classes)
    place = {
        id(client_data.test): client
        for client, client_data in reversed(list(enumerate(loaded.clients_data)))
        if client_data.test
    }
    rows = pooled([test[client] for client in place.values()])
    size = [test[client].size for client in place.values()]
    begin = dict(zip(place, torch.tensor([0, *size]).cumsum(0).tolist(), strict=False))

    def made() -> Tree:
        engine = engine_of(heterogeneous, prediction_tasks(heterogeneous, rows), trained.store)
        mean = Ensemble(classes=classes, weigh="examples")
        total, private = mean.zero(), not heterogeneous.fused
        for arch, some in by_architecture(heterogeneous.architectures, tuple(range(heterogeneous.count))):
            invited = some if private else some[:1]
            version = 2 * recipe.federation.rounds
            job = Job(work=f"said/{arch}", shared=trained.models(arch), version=version, clients=invited, seed=0)
            for message in drain(engine, job):
                total = mean.add(total, message)
        teacher_label_M = mean.probabilities(total).argmax(-1)
        confusion = torch.zeros(len(test), classes, classes, dtype=torch.float64)
        for client, client_data in enumerate(loaded.clients_data):
            if client_data.test:
                label = torch.as_tensor(test[client].labels)
                at = int(begin[id(client_data.test)])
                pair = label * classes + teacher_label_M[at : at + len(label)]
                confusion[client] = torch.bincount(pair, minlength=classes**2).view(classes, classes).double()
        return {"confusion": confusion}

    metrics = folder.tree("ensemble", made)
    return Column(value_N=values_N(recipe, metrics), metrics=metrics)


def save_models(
    loaded: LoadedExperiment, heterogeneous: HeterogeneousClients, trained: Trained, folder: RunFolder
) -> None:
    """A folder for each architecture: its one model, or those of its clients that have trained one."""
    fused, version = heterogeneous.fused, 2 * heterogeneous.recipe.federation.rounds
    reads_text = loaded.tokenizer is not None
    save_tree(folder.path / "state" / "final.safetensors", trained.state.best.flat())
    for arch, some in heterogeneous.architectures.items():
        files: dict[str, str] = {}
        if fused:
            save_tree(folder.path / "model" / arch / "model.safetensors", trained.models(arch).flat())
        for client in () if fused else trained.store.split_by_state(some, version)[0]:
            own = trained.store.load((client,), version)
            params, _ = trees.split(trees.take(own or {}, 0), "params/")
            if params:
                files[loaded.clients_data[client].name] = f"{client:04d}.safetensors"
                save_tree(folder.path / "model" / arch / f"{client:04d}.safetensors", params)
        about = {
            "classes": list(loaded.classes),
            "student": heterogeneous.students[arch].model_dump(),
            "tokenizer": STUDENT_TOKENIZER if reads_text else None,
            "vocabulary": list(loaded.vocabulary.words) if loaded.vocabulary else None,
            "clients": [loaded.clients_data[client].name for client in some],
            "files": files,
        }
        folder.write_json(f"model/{arch}/config.json", about)


def public_bytes(loaded: LoadedExperiment, public: Shard) -> int:
    """Of the public rows, as they are sent to one client."""
    if isinstance(public, ArrayShard):
        return int(public.x.nbytes)
    return sum(len(record.text.encode()) for record in loaded.public_split.unlabelled)


def metrics_by_arch(
    heterogeneous: HeterogeneousClients, columns: Mapping[str, Column]
) -> dict[str, float | str | None]:
    """Each architecture's clients, and their mean in every column in which they have a model."""
    out: dict[str, float | str | None] = {}
    for arch, some in heterogeneous.architectures.items():
        out[f"{arch}.clients"] = float(len(some))
        out[f"{arch}.mean"] = float(columns["federated"].value_N[list(some)].mean())
        for name in ("alone", "alone_best"):
            if name in columns:
                out[f"{arch}.{name}"] = float(columns[name].value_N[list(some)].mean())
    return out
