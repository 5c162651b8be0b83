"""Counts the memory of one client: frozen weights and training peak.

Measured, for whatever the method is: the real work is done once for one client, through the loop that
every engine runs, and every tensor's storage is counted from its birth to its end. So a method that
takes no way back through the model, or holds no moments, is seen to need less, whoever wrote it. The
interpreter, its libraries and what an allocator keeps for later are left out: they are this
simulation's, not the method's. Of all clients the one with the longest rows is taken.

References:
    Rajbhandari, Rasley, Ruwase, He. "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models". International Conference for High Performance Computing, 2020. https://arxiv.org/abs/1910.02054
    (what is held while training: weights, gradients, moments, activations, buffers)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.contracts.client import Costed, Source
from lichen.core.fold import serve
from lichen.core.message import Job
from lichen.core.seeds import derive
from lichen.core.store import ClientStore
from lichen.recipes.assemble.experiment import Experiment, lr_name
from lichen.recipes.assemble.live_bytes import LiveBytes
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import client_tasks, initial_shared
from lichen.recipes.assemble.pieces.split_memory import split_memory
from lichen.recipes.assemble.preference.references import without_references
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["footprint", "peak_bytes"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes of one client.

    Attributes:
        frozen: Of the foundation model as it is held; 0 for a student.
        training: The most it holds besides at any moment of its training: shared tensors, gradients,
            moments, activations, the message.
    """

    frozen: int
    training: int

    @property
    def whole(self) -> int:
        """Both."""
        return self.frozen + self.training


@contextmanager
def peak_bytes(device: str) -> Iterator[list[int]]:
    """The most bytes of tensors made inside, put into the list when left.

    Args:
        device: An accelerator's own counter is asked; elsewhere tensors are counted.
    """
    peaks: list[int] = []
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peaks
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
        return
    with LiveBytes() as live_bytes:
        yield peaks
    peaks.append(live_bytes.peak)


def frozen_tensors(foundation: Any) -> tuple[Tensor, ...]:
    """Weights and buffers of a frozen model, each storage once."""
    if foundation is None:
        return ()
    each = [*foundation.parameters(), *foundation.buffers()]
    return tuple({x.untyped_storage().data_ptr(): x for x in each}.values())


def dearest(source: Source, clients: int) -> int:
    """The client with the most tokens; the first one where that is not known."""
    if not isinstance(source, Costed):
        return 0
    costs = [source.cost(client) for client in range(clients)]
    return costs.index(max(costs))


def footprint(recipe: Recipe) -> Footprint | None:
    """What one client of a recipe needs; None where clients do not train one model of an opened recipe.

    Raises:
        LichenError: whatever does not fit in the recipe.
    """
    if not task_of(recipe.task).procedure.rounds or recipe.exchange is not None:
        return None
    loaded = open_recipe(recipe, keep_private=False)
    if recipe.split is not None:
        task = client_tasks(loaded.experiment)[f"train {lr_name(recipe.optimizer.lr[0])}"]
        both = split_memory(loaded.experiment, task, _dearest_of(loaded.experiment))
        return Footprint(frozen=both.client_frozen, training=both.client_training)
    frozen = frozen_tensors(loaded.foundation)
    size = sum(x.untyped_storage().nbytes() for x in frozen)
    training = _training(without_references(loaded.experiment))
    return None if training is None else Footprint(frozen=size, training=training)


def _dearest_of(experiment: Experiment) -> int:
    """The client of a recipe that trains on most."""
    source = client_tasks(experiment)[f"train {lr_name(experiment.recipe.optimizer.lr[0])}"].source
    return dearest(source, len(experiment.server.roster))


def _training(experiment: Experiment) -> int | None:
    recipe = experiment.recipe
    known, name = client_tasks(experiment), f"train {lr_name(recipe.optimizer.lr[0])}"
    if name not in known:
        return None
    client = _dearest_of(experiment)
    shared = initial_shared(experiment.server, recipe.optimizer.lr[0])
    job = Job(
        work=name,
        shared=shared,
        version=0,
        clients=(client,),
        seed=derive(recipe.seed, "footprint"),
        base=experiment.model.base,
        settings={"lr_scale": 1.0},
    )
    device = recipe.model.device
    with tempfile.TemporaryDirectory() as folder:
        store = ClientStore(Path(folder))
        with peak_bytes(device) as peaks:
            for _ in serve(job, known, store, base=experiment.model.base, block_size=1, device=device):
                pass
    return shared.nbytes + peaks[0]
