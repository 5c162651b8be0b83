"""Makes the recipe of a run on another base."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lichen.core.errors import LichenError
from lichen.recipes.artifacts.distil.learned import learning
from lichen.recipes.schema.features.periods.answers import NO_ANSWERS, PREFERS, TAKES, writes_no_answers
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.read import Staged, read_page
from lichen.tasks.registry import task_of

__all__ = ["How", "moved_recipe"]

How = Literal["as-is", "distil", "restart"]

DISTIL, CLIENTS = "distil", "clients"
"""The stages of a base to which the old model is distilled."""


def moved_recipe(recipe: Recipe, model: str, how: How, *, rounds: int | None, source: Path, answers: Path) -> Any:
    """The recipe of the new run: one run, or of ``distil`` two stages.

    Args:
        recipe: Of the old run.
        model: The new base, as a recipe names it.
        how: What becomes of the adapter.
        rounds: At the clients; None: as many as the old run had.
        source: The old run's folder.
        answers: The rows that the old model writes, of ``distil``.

    Raises:
        LichenError: if the old run has no such adapter, or its recipe does not carry over.
    """
    _refuse(recipe, how, source)
    if how == "as-is" and not (source / "adapter").is_dir():
        raise LichenError("has no adapter to put on another base", where=str(source), fix="use --how distil or restart")
    there = Path(model).expanduser()
    place = str(there.absolute()) if there.exists() else model
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    values["name"] = f"{recipe.name}-rebased"
    section = values.setdefault("model", {})
    for key in ("scratch", "layers", "random"):
        section.pop(key, None)
    section["name"] = place
    adapter = section.setdefault("adapter", {})
    adapter.pop("init_from", None)
    if rounds is not None:
        values.setdefault("federation", {})["rounds"] = rounds
    if how == "as-is":
        adapter["init_from"] = str((source / "adapter").absolute())
    if how != "distil":
        return read_recipe(values)
    first = learning(values, recipe, answers)
    second = {key: value for key, value in values.items() if key not in ("model", "name", "question")}
    later = {key: value for key, value in section.items() if key != "name"}
    stages = [
        {**{key: value for key, value in first.items() if key not in ("name", "question")}, "name": DISTIL},
        {**second, "model": later, "name": CLIENTS},
    ]
    page = {"name": values["name"], "question": recipe.question, "stages": stages}
    staged = read_page(page)
    assert isinstance(staged, Staged)
    return staged


def _refuse(recipe: Recipe, how: How, source: Path) -> None:
    where, other = str(source), "run the recipe anew on the other base: lichen run RECIPE -s model.name=NEW"
    if recipe.model.student is not None or recipe.model.students or not task_of(recipe.task).procedure.rounds:
        raise LichenError("has no foundation model whose base could change", where=where, fix=other)
    if recipe.method.asks_only:
        raise LichenError("found its prompt by asking this base, and no other knows it", where=where, fix=other)
    if recipe.noised is not None:
        what = "its noise was paid for by a budget that another run on the same rows would overdraw"
        raise LichenError(what, where=where, fix="plan a budget for both, and run the recipe anew on the other base")
    if recipe.aggregation.local_params and not recipe.model.adapter.facts.whole and how == "as-is":
        what = "leaves a part of each adapter with its client, and gives none that is whole"
        raise LichenError(what, where="federation.aggregate", fix="use --how restart")
    if how == "distil" and recipe.prefers:
        raise LichenError(PREFERS, where="--how distil", fix="use as-is or restart")
    if how == "distil" and writes_no_answers(recipe):
        raise LichenError(NO_ANSWERS, where="--how distil", fix=TAKES)
