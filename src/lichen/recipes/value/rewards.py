"""Rounds of a recipe that pay clients in coordinates of the model, and the scores of what each has earned."""

from __future__ import annotations

from pathlib import Path

from lichen.algorithms.average import Average
from lichen.algorithms.rewarded import Rewarded, own_models
from lichen.algorithms.scores import require_everyone
from lichen.core import tree as trees
from lichen.core.collecting.admission import Admission
from lichen.core.collecting.collect import collect
from lichen.core.contracts.algorithm import ServerState
from lichen.core.contracts.engine import Engine
from lichen.core.message import Job
from lichen.core.tree import Tree
from lichen.recipes.assemble.sides.server import ServerSide
from lichen.recipes.value.rounds import SPILL

__all__ = ["earned", "rewards"]


def rewards(server: ServerSide, rounds: Average, folder: Path) -> Rewarded:
    """The rounds, with the rewards of the recipe.

    Args:
        server: The server's side.
        rounds: The federation's.
        folder: Where they may leave messages until a round is over.
    """
    return Rewarded(rounds=rounds, beta=server.recipe.federation.reward_beta, spill=folder / SPILL)


def earned(server: ServerSide, engine: Engine, state: ServerState, admission: Admission) -> Tree:
    """Everybody's sums over its own test rows, ``(N, ...)``, each with the model that it has earned.

    Args:
        server: The server's side.
        engine: Asks the clients.
        state: After the rounds.
        admission: What counts of the answers.

    Raises:
        LichenError: if a client could not say, or was not there.
    """
    everyone = tuple(range(len(server.roster)))
    job = Job(work="test", shared=state.best.for_model, version=0, clients=everyone, seed=0, base=server.model.base)
    came = collect(engine, own_models(job, state), admission=admission)
    require_everyone(came.attendance, job, "score")
    whole = {name: x_A.new_zeros(len(everyone), *x_A.shape[1:]) for name, x_A in came.metrics.items()}
    return trees.map_tree(lambda x, y: x.index_copy(0, came.client_N, y), whole, came.metrics)
