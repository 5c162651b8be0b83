"""The model of one client's own, out of a finished run's folder, as other tools load it.

What all share lies in the run's ``adapter/``; what a client has beside it is private state. Where both make one
adapter, that is what is written. Two adapters whose weight differs by row or by token are written as two, with the
numbers that weigh them, since PEFT weighs adapters alike in all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.clients.personal.apfl import Apfl
from lichen.clients.personal.pair import OTHER, is_factor, pair_of
from lichen.clients.personal.training import MINE
from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.rounds import load_state
from lichen.core.store import ClientStore
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.present.clients import read_clients
from lichen.recipes.assemble.sides.personal import keeps_own, stages_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["OwnModel", "own_model"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModel:
    """A client's own model, without client axis.

    Attributes:
        trainable: Its tensors, by the names of those that all share; a pair of constant weight has twice the rank.
        other: The other adapter of a pair whose weight differs; none: ``trainable`` is the whole of it.
        weights: What weighs the two: ``center`` of rows, or gates by layer.
    """

    trainable: Tree
    other: Tree
    weights: Tree


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
        raise LichenError(what, where="--client", fix="leave it out, or run a recipe with the section personal")
    names = [row["client"] for row in read_clients(folder)]
    if client not in names:
        raise LichenError(
            f"no client is called {client!r}", where="--client", fix=f"use one of clients.csv: {', '.join(names[:5])}"
        )
    own_C = _private(folder, "personal" if stages else "federated", names.index(client), newest=stages)
    if own_C is None:
        what = f"{client} kept nothing of its own at this place, or was never invited: its model is the shared one"
        raise LichenError(what, where="--client", fix="leave it out")
    made = {name: x[0] for name, x in _model(recipe, shared.trainable, own_C).items()}
    other, trainable = trees.split(made, OTHER)
    weights, trainable = trees.split(trainable, _WEIGHTS)
    return OwnModel(trainable={**shared.trainable, **trainable}, other=other, weights=weights)


_WEIGHTS = "weights/"


def _private(folder: Path, column: str, client: int, *, newest: bool) -> Tree | None:
    """A client's private state in the column's kept round, or after its last one."""
    found: Mapping[Path, float] = {}
    rounds: dict[Path, int] = {}
    best: dict[Path, int] = {}
    for file in sorted((folder / "state" / column).glob("*/server.safetensors")):
        state = load_state(file)
        found = {**found, file.parent: state.best_value}
        rounds[file.parent] = state.round
        best[file.parent] = state.best_round if state.best_round >= 0 else state.round
    whole = [place for place in found if rounds[place] == max(rounds.values())]
    if not whole:
        return None
    place = min(whole, key=lambda one: found[one])
    version = 2 * rounds[place] if newest else best[place]
    return ClientStore(place / "clients").load([client], version)


def _model(recipe: Recipe, shared: Tree, own_C: Tree) -> Tree:
    """The client's tensors, ``(1, ...)``; of two adapters the other's and what weighs them under prefixes."""
    mine_C, rest = trees.split(own_C, MINE)
    params_C, best_C = trees.split(rest, "params/")[0], trees.split(rest, "best/")[0]
    config = recipe.personal
    kind = None if config is None else config.kind
    making: dict[str | None, Callable[[], Tree]] = {
        "apfl": lambda: Apfl(alpha=0.5, rate=0.0).model(shared, mine_C),
        "feddpa": lambda: _dual(recipe, shared, best_C or trees.split(mine_C, "params/")[0], mine_C),
        "fedalt": lambda: _rest_of_world(mine_C),
    }
    inside_C = trees.split(mine_C, "params/")[0]
    return making.get(kind, lambda: best_C or params_C or inside_C)()


def _dual(recipe: Recipe, shared: Tree, own_C: Tree, mine_C: Tree) -> Tree:
    config = recipe.personal
    assert config is not None
    first_C = trees.expand({name: x for name, x in shared.items() if is_factor(name)}, 1)
    if not config.anchors:
        return pair_of(first_C, own_C, second=config.cap)
    seen_C = mine_C["anchors_seen"].clamp(min=1)
    center_C = config.cap * mine_C["anchors"] / seen_C[:, None]
    return {**trees.join(OTHER, first_C, own_C), f"{_WEIGHTS}center": center_C}


def _rest_of_world(mine_C: Tree) -> Tree:
    trained_C = trees.split(mine_C, "params/")[0]
    gates_C = {name: x for name, x in trained_C.items() if name.endswith("lora_gate")}
    own_C = {name: x for name, x in trained_C.items() if name not in gates_C}
    return trees.join(OTHER, trees.split(mine_C, OTHER)[0], trees.join(_WEIGHTS, gates_C, own_C))
