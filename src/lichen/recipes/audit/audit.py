"""What an honest-but-curious server, or whoever has the model, could have learned from a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.audit.separation import Separation
from lichen.core.collecting.history import History
from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST, check
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.inputs import inputs_of, require_same
from lichen.recipes.artifacts.withdrawn.deletions import refuse_withdrawn
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.open import LoadedExperiment, open_recipe
from lichen.recipes.assemble.sides.canaries import Canaries, canary_key
from lichen.recipes.assemble.sides.privacy import KEY, with_secret
from lichen.recipes.audit.canaries import FoundCanaries, found_canaries
from lichen.recipes.audit.members import membership
from lichen.recipes.audit.messages import ReadMessage, read_messages
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.recipes.tasks.learning import HISTORY
from lichen.tasks.registry import task_of

__all__ = ["Audit", "audit"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found.

    Attributes:
        membership: What each score tells of training rows, by :data:`lichen.recipes.audit.members.ATTACKS`.
        messages: What each message that was looked at gives away; none where nothing is read off one.
        retained: Whether the run has retained its messages.
        canaries: What canaries show; None: it has none.
    """

    membership: Mapping[str, Separation]
    messages: tuple[ReadMessage, ...] = ()
    retained: bool = False
    canaries: FoundCanaries | None = None


def audit(folder: Path | str, *, rows: int = 1000, messages: int = 8, sums: bool = False, seed: int = 0) -> Audit:
    """Attack a finished run with its own data at hand, to say what it gave away.

    Args:
        folder: The run's folder; its data and its model are opened again.
        rows: Training rows, and test rows, that are scored at most.
        messages: Retained messages that are read at most.
        sums: Read sums of rounds in their place: all that masks would leave a server to see.
        seed: Of the intervals.

    Returns:
        What was found.

    Raises:
        LichenError: if the run is not finished, is of another task, or its data have changed.
    """
    folder = last_stage(folder)
    summary, recipe = read_summary(folder), recipe_of(folder)
    _refuse(recipe, folder)
    check(folder, MANIFEST, fix=f"make it again: lichen run --resume {folder}")
    refuse_withdrawn(folder)
    loaded = open_recipe(recipe)
    require_same(folder, recipe, inputs_of(loaded))
    tree, _ = load_tree(folder / "state" / "final.safetensors")
    shared = Shared.of_flat(tree)
    members = membership(loaded.experiment, shared, rows=rows, seed=seed)
    canaries = None
    if recipe.audit is not None:
        secret = canary_key(recipe, folder, begun=True)
        canaries = _canaries(loaded, loaded.canaries(secret), shared, summary.get("privacy"))
        loaded = loaded.planted(secret)
    if not recipe.federation.history or not messages:
        return Audit(membership=members, canaries=canaries)
    loaded = _with_key(loaded, folder)
    lr = float(summary["extra"]["lr.federated"])
    history = History(folder / "state" / "federated" / lr_name(lr) / HISTORY)
    found = tuple(read_messages(loaded, history, messages=messages, sums=sums))
    return Audit(membership=members, messages=found, retained=True, canaries=canaries)


def _canaries(
    loaded: LoadedExperiment, canaries: Canaries, shared: Shared, privacy: Mapping[str, Any] | None
) -> FoundCanaries:
    """What canaries show, beside what was promised."""
    if privacy is None or privacy["epsilon"] is None:
        return found_canaries(loaded.experiment, canaries, shared)
    delta, epsilon, unit = privacy["delta"], privacy["epsilon"], privacy["unit"]
    return found_canaries(loaded.experiment, canaries, shared, delta=delta, promised=epsilon, unit=unit)


def _with_key(loaded: LoadedExperiment, folder: Path) -> LoadedExperiment:
    """The experiment that knows which rows were sampled for a step, where that is a secret of the run's."""
    experiment, recipe = loaded.experiment, loaded.experiment.recipe
    if recipe.noised is None:
        return loaded
    key = folder / "state" / KEY
    if recipe.noised.seed is None and not key.exists():
        raise LichenError(
            "is gone, and nobody knows which rows a message is of", where=str(key), fix="audit with --messages 0"
        )
    clients = with_secret(experiment.server, experiment.clients, folder)
    return replace(loaded, experiment=replace(experiment, clients=clients))


def _refuse(recipe: Recipe, folder: Path) -> None:
    if recipe.prefers:
        what = "a row of task prefer is two answers and a reference, and one answer alone is looked at here"
        raise LichenError(what, where=str(folder), fix="use a run of another task")
    if not task_of(recipe.task).procedure.rounds or recipe.method.asks_only:
        raise LichenError(f"a run of task {recipe.task} has no rounds of training to audit", where=str(folder))
