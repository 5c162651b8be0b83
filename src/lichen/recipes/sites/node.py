"""A node of a recipe: what it can be asked, with the rows of one site or with everybody's, and what answers for it.

Of a task without rounds its clients are asked for statistics of frozen features
(:mod:`lichen.recipes.sites.statistics_node`), of any other what its parts say (:mod:`lichen.recipes.assemble.parts`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from lichen.core.store import ClientStore
from lichen.engines.remote.guard import Guard, Open
from lichen.engines.remote.talks import Talks
from lichen.engines.remote.worker import SiteWorker
from lichen.recipes.assemble.aggregation import down_of
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.pieces.hosts import Hosts
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.sides.canaries import canary_key
from lichen.recipes.assemble.sides.privacy import secret_of
from lichen.recipes.schema.read import recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.sites.open_site import open_site
from lichen.recipes.sites.place import SitePlace
from lichen.recipes.sites.rounds_node import Node, RoundsNode
from lichen.recipes.sites.site_node import site_answers
from lichen.recipes.sites.statistics_node import open_statistics
from lichen.tasks.registry import task_of

__all__ = ["node_worker", "talks_in"]


def node_worker(recipe: Recipe, state: Path, data: Path | None = None) -> SiteWorker:
    """What answers a node's questions, its rows read.

    Args:
        recipe: The recipe.
        state: Where its clients' private state lies.
        data: The rows of the one site that this node is; it saves its place in ``state``. None: all of the recipe's.

    Raises:
        LichenError: whatever does not fit, by its key or file.
    """
    place = None if data is None else SitePlace(open_site(recipe, data), state)
    if place is None:
        whole = _whole(recipe, state)
        return SiteWorker(talks_in(recipe, state, lambda: whole))
    return SiteWorker(talks_in(recipe, state, place.loaded), recipe=recipe_sha256(recipe), also=site_answers(place))


def talks_in(
    recipe: Recipe,
    state: Path,
    node_of: Callable[[], Node],
    *,
    guard: Guard = Open(),  # noqa: B008
) -> Callable[[str], Talks]:
    """Makes what does the jobs of a private state, by its name.

    Args:
        recipe: The recipe.
        state: The folder in which clients keep their private state.
        node_of: What clients can do; asked at the first job.
        guard: Looks at jobs, and at what comes of them.
    """

    def talks(name: str) -> Talks:
        node = node_of()
        return Talks(
            node.client_tasks(),
            ClientStore(state / name, listed=True),
            base=node.base,
            device=recipe.model.device,
            down=down_of(recipe),
            agreed=node.start,
            guard=guard,
        )

    return talks


def _whole(recipe: Recipe, state: Path) -> Node:
    """A node with everybody's rows, and with the run's canaries where it has any."""
    if recipe.pipeline is not None:
        return Hosts(recipe)
    if not task_of(recipe.task).procedure.rounds:
        return open_statistics(recipe)
    loaded = open_recipe(recipe).fingerprinted()
    if recipe.audit is not None:
        loaded = loaded.planted(canary_key(recipe, state.parent, begun=True))
    experiment = replace(loaded.experiment, clients=replace(loaded.experiment.clients, state=state))
    return RoundsNode(with_references(experiment, state), partial(secret_of, experiment.server, state))
