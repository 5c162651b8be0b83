"""Leaves clients' own models at their site, as files that other tools load, when they are scored.

What a client keeps never leaves its site, and of what all share a site has what it was sent last. So the site writes
its clients' models itself, in the moment when both are there: ``own/NAME`` in the folder of the run.

Legend: C clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.clients.personal.own_model import folder_name
from lichen.core import tree as trees
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.expected import Expected
from lichen.core.files.durable import whole_folder
from lichen.core.message import Job, Message
from lichen.core.store import save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.core.wrapping import innermost
from lichen.models.cohort import Cohort
from lichen.models.peft.own import write_own
from lichen.recipes.assemble.model import described_base
from lichen.recipes.assemble.sides.personal import model_of_client
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["LeftAtSite", "Writer", "own_writer"]

_OWN = "own"
"""The folder of own models in that of a run at a site."""


Writer = Callable[[Shared, Sequence[int], Tree], None]


@final
@dataclass(frozen=True, slots=True)
class LeftAtSite:
    """A score of clients' own models, as a client work, which leaves these as files.

    Args:
        inner: The score.
        write: Takes what all share, clients by their numbers in the roster, and their private state.
    """

    inner: ClientWork
    write: Writer

    def expected(self, job: Job) -> Expected:
        """The score's."""
        return self.inner.expected(job)

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """The score's beginning; raises as that."""
        if own_C:
            self.write(job.shared, clients, own_C)
        return self.inner.init(job, clients, own_C)

    def step(self, state: Any, batch: Batch) -> Any:
        """The score's."""
        return self.inner.step(state, batch)

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The score's message and private state."""
        return self.inner.final(state)


def own_writer(recipe: Recipe, model: CohortModel, folder: Path, names: dict[int, str]) -> Writer:
    """What writes clients' own models.

    Args:
        recipe: Says what they are made of.
        model: What they are models of.
        folder: The run's, at the site.
        names: The site's clients by their numbers in the roster.
    """

    cohort = innermost(model)

    def write(shared: Shared, clients: Sequence[int], own_C: Tree) -> None:
        for at, client in enumerate(clients):
            own = model_of_client(recipe, shared.trainable, {name: x[at : at + 1] for name, x in own_C.items()})
            with whole_folder(folder / _OWN / folder_name(names[client]), shared=False) as draft:
                if isinstance(cohort, Cohort) and cohort.adapter.kind.peft is not None:
                    base, task = described_base(recipe, cohort.wrapped.model), task_of(recipe.task).peft
                    write_own(draft, own, spec=cohort.adapter, base_name=base, task=task, patch=shared.patch)
                else:
                    save_tree(draft / "model.safetensors", trees.plain(own.trainable))

    return write
