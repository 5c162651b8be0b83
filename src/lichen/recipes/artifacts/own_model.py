"""The model of one client's own, out of a finished run's folder."""

from __future__ import annotations

from pathlib import Path

from lichen.clients.personal.own_model import OwnModel, folder_name
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.present.clients import read_clients
from lichen.recipes.assemble.sides.personal import keeps_own, model_of_client, stages_of
from lichen.recipes.assemble.sides.withdrawal.absent import no_such_client
from lichen.recipes.schema.recipe import Recipe

__all__ = ["own_model", "own_path", "with_own"]


def own_model(folder: Path, recipe: Recipe, shared: Shared, client: str) -> OwnModel:
    """What a client has of its own after a run.

    Args:
        folder: The finished run.
        recipe: Its recipe.
        shared: What all share.
        client: Its name, as in ``clients.csv``.

    Raises:
        LichenError: if the run made no models of clients' own, knows no such client, or it kept nothing.
    """
    config = recipe.personal
    stages = bool(stages_of(recipe))
    if (config is not None and config.kind == "ridge") or not (stages or keeps_own(recipe)):
        what = "its clients share one model" if config is None else "heads in closed form stand in no adapter"
        if recipe.federation.reward != "none":
            what = "the models that clients have earned lie in the server's state, and are not written as adapters"
        raise LichenError(what, where="--client", fix="leave it out, or run a recipe with the section personal")
    names = [row["client"] for row in read_clients(folder)]
    if client not in names:
        raise no_such_client(client, names, where="--client")
    own_C = _private(folder, "personal" if stages else "federated", names.index(client), newest=stages)
    if own_C is None:
        what = f"{client} kept nothing of its own at this place, or was never invited: its model is the shared one"
        raise LichenError(what, where="--client", fix="leave it out")
    return model_of_client(recipe, shared.trainable, own_C)


def with_own(tree: Tree, own: OwnModel, *, where: str, fix: str) -> Tree:
    """What was learned, where a client's own model takes the place of the shared one.

    Args:
        tree: What all share, flat.
        own: The client's.
        where: What asks for one whole model, for errors.
        fix: What to do where there is none.

    Raises:
        LichenError: if the client has two adapters that make no one model.
    """
    if own.other:
        what = "two adapters whose weight differs by row cannot be merged into one model's weights"
        raise LichenError(what, where=where, fix=fix)
    return {**tree, **own.trainable}


def own_path(folder: Path, client: str, more: str = "") -> Path:
    """Where a client's own model goes, if nobody says where.

    Args:
        folder: The run.
        client: Its name.
        more: How the name ends.
    """
    return folder / "own" / f"{folder_name(client)}{more}"


def _private(folder: Path, column: str, client: int, *, newest: bool) -> Tree | None:
    """A client's private state in the column's kept round, or after its last one."""
    states = {file.parent: load_state(file) for file in (folder / "state" / column).glob("*/server.safetensors")}
    last = max((state.round for state in states.values()), default=0)
    whole = {place: state for place, state in states.items() if state.round == last}
    if not whole:
        return None
    place = min(whole, key=lambda one: (whole[one].best_value, one))
    version = whole[place].best_round if whole[place].best_round >= 0 else last
    version = 2 * last if newest else version
    return ClientStore(place / "clients").load([client], min(version, whole[place].rollback.get(client, version)))
