"""Reads a finished run again: its recipe, what it learned, and its foundation model with that in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST, check
from lichen.core.store import load_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.data.sources.catalog import resolve_model
from lichen.models.peft.merge import attach, merge
from lichen.models.whole import filled
from lichen.present.summary import read_summary
from lichen.recipes.assemble.bases.in_force import require_model, with_base_in_force
from lichen.recipes.assemble.chat_template import put_template
from lichen.recipes.assemble.class_names import class_names
from lichen.recipes.assemble.model import SCRATCH, foundation_of, scratch_folder, spec_of
from lichen.recipes.rows.prepare import classes_of, gather, split_clients
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.tasks.registry import task_of

__all__ = [
    "STUDENT_FIX",
    "attach_learned",
    "check_artifacts",
    "classes_of_run",
    "load_finished",
    "load_foundation",
    "merge_learned",
    "open_models",
    "student_config",
]

STUDENT_FIX = "use --student, which writes a folder that torch loads"


def load_finished(folder: Path) -> tuple[Recipe, Tree]:
    """The recipe of a finished run, and what it learned; refused if it is not finished, or damaged."""
    read_summary(folder)  # says so where the run is not finished
    check_artifacts(folder)
    require_model(folder)
    tree, _ = load_tree(folder / "state" / "final.safetensors")
    return with_base_in_force(recipe_of(folder), folder), tree


def check_artifacts(folder: Path) -> None:
    """Refuse a finished run whose files are not those of its manifest."""
    check(folder, MANIFEST, fix=f"make it again: lichen run --resume {folder}")


def classes_of_run(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """The run's classes by its own folder; of a folder that is older than their file, by its data."""
    if recipe.writes:
        return ()
    return class_names(folder) or classes_of(recipe, gather(recipe))


def load_foundation(recipe: Recipe, folder: Path) -> tuple[Any, Any, tuple[str, ...]]:
    """``(model, tokenizer, classes)`` as the run loaded them; nothing of its data is read."""
    if recipe.method.asks_only:
        raise LichenError(
            "a prompt found by asking lies outside the model", where=recipe.name, fix="its tensors lie in model/"
        )
    scratch = recipe.model.scratch is not None
    if (recipe.model.name is None and not scratch) or not task_of(recipe.task).procedure.rounds:
        student = recipe.model.student is not None
        raise LichenError(
            f"a run of task {recipe.task} on {recipe.model.name or 'a student'} has no merged transformers model",
            where=recipe.name,
            fix=STUDENT_FIX if student else "its tensors lie in the run's model/ as safetensors",
        )
    classes = classes_of_run(recipe, folder)
    if scratch:
        own_base = folder / SCRATCH
        source: str | Path = (
            own_base if own_base.is_dir() else scratch_folder(recipe, split_clients(recipe, gather(recipe)))
        )
    else:
        source = resolve_model(str(recipe.model.name))
    model, tokenizer = foundation_of(recipe, source, len(classes))
    put_template(recipe, tokenizer, run=folder)
    return model, tokenizer, classes


def student_config(folder: Path) -> Mapping[str, Any]:
    """What a run's ``model/config.json`` says of its student, with ``classes`` and ``vocabulary`` as lists.

    Raises:
        LichenError: if it says nothing of one.
    """
    file = folder / "model" / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        words = [int(token) for token in about.get("vocabulary") or ()]
        return {**about, "classes": list(about["classes"]), "vocabulary": words}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LichenError("does not describe a student", where=str(file), fix="run the recipe again") from None


def open_models(folder: Path) -> tuple[Recipe, Any, Any, Any]:
    """``(recipe, bare model, the run's model, tokenizer)`` of a finished run over a foundation model.

    Raises:
        LichenError: if the run is not finished, is damaged, or has no foundation model.
    """
    recipe, tree = load_finished(folder)
    if recipe.model.student is not None:
        raise LichenError("has no foundation model", where=str(folder), fix="name a run that adapts one")
    model, tokenizer, _ = load_foundation(recipe, folder)
    return recipe, model, attach_learned(recipe, model, tree), tokenizer


def attach_learned(recipe: Recipe, model: Any, tree: Tree) -> Any:
    """The model with what was learned beside its weights."""
    if recipe.model.adapter.facts.whole:
        return filled(model, tree)
    shared = Shared.of_flat(tree)
    return attach(model, shared.trainable, shared.patch, spec=spec_of(recipe, model))


def merge_learned(recipe: Recipe, model: Any, tree: Tree) -> Any:
    """The model with what was learned in its weights."""
    if recipe.model.adapter.facts.whole:
        return filled(model, tree)
    shared = Shared.of_flat(tree)
    return merge(model, shared.trainable, shared.patch, spec=spec_of(recipe, model))
