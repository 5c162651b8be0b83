"""Extends a finished run to more rounds.

A round depends on the state before it and on the seed, not on how many are to come; so a run that is given more rounds
goes on from its checkpoints and ends where a run of that many rounds would have ended. This holds only while nothing
in a round asks for their number, as a falling learning rate does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.recipes.schema.read import MOVABLE, different_keys, recipe_of, recipe_sha256, write_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = ["give_more_rounds"]

STALE = (
    "federated",
    "without",
    "pooled.all",
    "proxy",
    "forgotten.after",
    *(f"{name}.{when}" for name in ("federated", "without") for when in ("unrepaired", "repaired")),
    "refused.federated",
    "refused.repaired",
)
"""Scores that were taken after the last round, under names that do not tell it."""


def give_more_rounds(path: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Let the folder's recipe have the rounds of ``recipe``, where that differs in them and in where things lie alone.

    A folder of this recipe, or of another one altogether, is left as it is.

    Args:
        path: The run's folder.
        recipe: The recipe to go on with.
        say: Called with what should be known.

    Raises:
        LichenError: if the run cannot be given so many rounds, and why.
    """
    digest_file, before = path / "state" / "recipe.sha256", recipe_of(path)
    changed = different_keys(before, recipe)
    if "federation.rounds" not in changed or set(changed) - {"federation.rounds", *MOVABLE}:
        return
    rounds = before.federation.rounds, recipe.federation.rounds
    federation = before.federation.model_copy(update={"rounds": rounds[1]})
    longer = before.model_copy(update={"federation": federation})
    _refuse(before, *rounds)
    every = before.federation.valid_every
    if rounds[0] % every:
        say(
            f"round {rounds[0]} was validated as the last one: a run of {rounds[1]} rounds from the start, which "
            f"validates every {every}, would not have looked at it"
        )
    for name in STALE:
        with suppress(FileNotFoundError):
            (path / "state" / "scores" / f"{name}.safetensors").unlink()
    with suppress(FileNotFoundError):
        (path / "summary.json").unlink()
    # Both are the folder's until its recipe is written: a kill in between leaves one that can be resumed.
    if digest_file.exists():
        write_atomic(digest_file, f"{recipe_sha256(before)}\n{recipe_sha256(longer)}".encode())
    write_atomic(path / "recipe.yaml", write_recipe(longer).encode())
    if digest_file.exists():
        write_atomic(digest_file, recipe_sha256(longer).encode())


def _refuse(before: Recipe, had: int, requested: int) -> None:
    where = "federation.rounds"
    anew = f"start a new run: lichen run RECIPE -s federation.rounds={requested}"
    if not task_of(before.task).procedure.rounds:
        raise LichenError(f"task {before.task} is one round by nature", where=where, fix="leave it as it is")
    if requested < had:
        raise LichenError(f"the run has {had} already, and rounds cannot be taken back", where=where, fix=anew)
    if before.noised is not None:
        what = "its noise and its budget are those of so many rounds, and more would pass what was promised"
        raise LichenError(what, where=where, fix=anew)
    if before.optimizer.schedule != "constant":
        raise LichenError(
            f"a {before.optimizer.schedule} learning rate falls to its end over all rounds, and these were {had}: "
            f"the rounds done would have had other rates in a run of {requested}",
            where=where,
            fix=f"{anew}; a run with optimizer.schedule: constant can be given more rounds",
        )
    if before.stream is not None:
        raise LichenError(
            "rounds are those of each period, and later ones have gone on from what earlier ones ended with",
            where=where,
            fix=anew,
        )
    if before.exchange is not None:
        raise LichenError(
            "what clients alone may train in a round of an exchange follows from the number of rounds",
            where=where,
            fix=anew,
        )
