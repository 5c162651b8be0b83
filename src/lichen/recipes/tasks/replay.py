"""Computes a finished run's model again from the messages it retained, whole or as if some clients had sent nothing.

The rounds are those of the run, by the same algorithm: sampled, averaged, stepped and validated as they were. Nobody
trains. What others sent stays what it was, though they began from tensors in which a client that is left out had a
part: it is what the client's messages did to the model, and neither a retrained model nor unlearning. The model of a
split run is scored whole, without the code and the noise that lie at its cuts.

References:
    Tianshu Song, Yongxin Tong and Shuyue Wei. "Profit Allocation for Federated Learning." IEEE Big Data 2019.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from lichen.core.collecting.admission import OPEN
from lichen.core.collecting.history import History
from lichen.core.errors import LichenError
from lichen.core.roster import Roster
from lichen.core.store import ClientStore
from lichen.core.wire.shared import Shared
from lichen.engines.replayed import ReplayEngine
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.aggregation import local_params_of
from lichen.recipes.assemble.column import local_engine
from lichen.recipes.assemble.experiment import lr_name, values_N
from lichen.recipes.assemble.open import open_recipe
from lichen.recipes.assemble.parts import tensors_of
from lichen.recipes.assemble.pieces.split_memory import unsplit
from lichen.recipes.assemble.preference.references import with_references
from lichen.recipes.assemble.sides.personal import norms_of
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.tasks.learning import HISTORY, federate, scored

__all__ = ["replay"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A model that was computed again.

    Attributes:
        scores: The recipe's metric of every client on its test rows, by name; those left out among them;
            not-a-number of who has none.
        shared: The model's tensors of the best round.
        best_round: That round.
    """

    scores: Mapping[str, float]
    shared: Shared
    best_round: int

    @property
    def mean(self) -> float:
        """The mean score of all clients that have one; not-a-number where nobody has."""
        known = [score for score in self.scores.values() if not math.isnan(score)]
        return sum(known) / len(known) if known else math.nan


def replay(folder: Path | str, *, without: Sequence[str] = ()) -> Replay:
    """Compute a run's model again from what its clients sent; the data are needed for validation and for the scores.

    Args:
        folder: A finished run's, with ``federation.history: true``.
        without: Names of clients whose messages are left out.

    Raises:
        LichenError: if the run is not finished or retained nothing, its data changed, a client is unknown, or more than
            messages made its model.
    """
    folder = last_stage(folder)
    summary, recipe = read_summary(folder), recipe_of(folder)
    _refuse(recipe, folder)
    refuse_withdrawn(folder)
    loaded = open_recipe(recipe)
    require_same(folder, recipe, inputs_of(loaded))
    lr = float(summary["extra"]["lr.federated"])
    # Messages are of the whole model, wherever its middle lay: nothing crosses a cut here.
    experiment = unsplit(with_references(loaded.experiment, folder / "state"))
    fed = experiment.recipe.federation.model_copy(update={"history": False})
    replayed = experiment.recipe.model_copy(update={"federation": fed, "value": None})
    experiment = experiment.with_server(recipe=replayed)
    server = experiment.server
    gone = _indices(server.roster, without)
    with tempfile.TemporaryDirectory() as aside:
        own = Path(aside)
        engine = ReplayEngine(
            local_engine(experiment, ClientStore(own / "clients")),
            History(folder / "state" / "federated" / lr_name(lr) / HISTORY),
            work=f"train {lr_name(lr)}",
            without=gone,
        )
        checkpoint, rounds = own / "server.safetensors", recipe.federation.rounds
        state = federate(server, engine, lr, rounds, checkpoint, lambda _: None, admission=OPEN)
        shared = tensors_of(server, lr, state.best)
        value_N = values_N(replayed, scored(server, engine, shared, admission=OPEN))
    scores = dict(zip((member.name for member in server.roster), value_N.tolist(), strict=True))
    return Replay(scores=scores, shared=shared, best_round=state.best_round)


def _refuse(recipe: Recipe, folder: Path) -> None:
    if not recipe.federation.history:
        raise LichenError(
            "retained none of its clients' messages",
            where=str(folder),
            fix="run it again with federation.history: true",
        )
    if recipe.has_help:
        raise LichenError(
            "help of teacher, synthetic or semi made this model, too, and is no message of a client",
            where=str(folder),
            fix="replay a run without these sections",
        )
    if recipe.federation.repair is not None:
        raise LichenError(
            "the server's repair made this model, too, and is no message of a client",
            where=str(folder),
            fix="replay a run without federation.repair",
        )
    if local_params_of(recipe) or norms_of(recipe):
        raise LichenError(
            "a part of the model never left its client",
            where=str(folder),
            fix="replay a run of another federation.aggregate or personal.kind",
        )


def _indices(roster: Roster, names: Sequence[str]) -> frozenset[int]:
    known = {member.name: place for place, member in enumerate(roster)}
    for name in names:
        if name not in known:
            some = ", ".join(list(known)[:5])
            raise LichenError(f"no client {name!r}", where="without", fix=f"use names of roster.json, such as {some}")
    return frozenset(known[name] for name in names)
