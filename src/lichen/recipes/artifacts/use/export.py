"""Exports a finished run: its adapter as it is, a transformers folder with everything merged, or a client's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lichen.clients.personal.own_model import OwnModel
from lichen.core.errors import LichenError
from lichen.core.files.durable import whole_folder
from lichen.core.private import make_folders, share
from lichen.core.store import save_tree
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.models.peft.own import write_own
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.model_card import write_card
from lichen.recipes.artifacts.own_model import own_model, own_path, with_own
from lichen.recipes.artifacts.use.finished import (
    STUDENT_FIX,
    check_artifacts,
    load_finished,
    load_foundation,
    merge_learned,
)
from lichen.recipes.assemble.bases.in_force import require_model
from lichen.recipes.assemble.model import described_base, spec_of
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.stages.folder import last_stage
from lichen.tasks.registry import task_of

__all__ = ["export", "require_empty"]


def export(
    folder: Path | str, *, merge: bool = False, out: Path | str | None = None, client: str | None = None
) -> Path:
    """Write the run's model: a plain transformers folder with everything merged, or the adapter as it is.

    Args:
        folder: The run folder; that of several stages means the last one.
        merge: Merge into the base's weights; else it is the adapter.
        out: Where to; by default ``folder/merged``, and for the adapter where it lies.
        client: The model of this client's own; by default the one that all share. It is private, and so is what is
            written: by default in ``folder/own/CLIENT``, or ``folder/own/CLIENT-merged``.

    Returns:
        The folder that loads elsewhere.

    Raises:
        LichenError: if the run is not finished, or has nothing of the kind.
    """
    folder, out = last_stage(folder), None if out is None else Path(out)
    if not merge and client is None:
        return _adapter(folder, out)
    recipe, tree = load_finished(folder)
    own = None if client is None else own_model(folder, recipe, Shared.of_flat(tree), client)
    if own is not None and recipe.model.student is not None:
        return _own_student(folder, {**tree, **own.trainable}, own_path(folder, str(client)), out, merge=merge)
    model, tokenizer, classes = load_foundation(recipe, folder)
    target = out or folder / "merged"
    if own is not None:
        target = out or own_path(folder, str(client), "-merged" if merge else "")
        if not merge:
            return _own_adapter(recipe, model, tokenizer, own, Shared.of_flat(tree).patch, target, given=out)
        tree = with_own(tree, own, where="--merge", fix="leave it out, and load both adapters")
    whole = merge_learned(recipe, model, tree)
    if classes:
        whole.config.id2label = dict(enumerate(classes))
        whole.config.label2id = {name: i for i, name in enumerate(classes)}
    if out is not None:
        require_empty(out)
    with whole_folder(target) as draft:
        whole.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_card(folder, draft, recipe, tokenizer, called=target.name)
        share(draft)
    return target


def _own_student(folder: Path, tree: Tree, target: Path, out: Path | None, *, merge: bool) -> Path:
    """A client's own student, in the form of the run's ``model/``."""
    if merge:
        raise LichenError("a student is whole as it is", where="--merge", fix="leave it out")
    if out is not None:
        require_empty(out)
    make_folders((out or target).parent)
    with whole_folder(out or target, shared=False) as draft:
        shutil.copytree(folder / "model", draft, dirs_exist_ok=True)
        save_tree(draft / "model.safetensors", tree)
    return out or target


def _own_adapter(
    recipe: Recipe, model: Any, tokenizer: Any, own: OwnModel, patch: Tree, target: Path, *, given: Path | None
) -> Path:
    """A client's own adapter in PEFT's format; of two that are weighed row by row both, and what weighs them."""
    if recipe.model.adapter.facts.whole:
        raise LichenError("its own models are no adapters", where="--client", fix="use --merge")
    if given is not None:
        require_empty(given)
    make_folders(target.parent)
    with whole_folder(target, shared=False) as draft:
        spec, about, task = spec_of(recipe, model), described_base(recipe, model), task_of(recipe.task).peft
        for part in write_own(draft, own, spec=spec, base_name=about, task=task, patch=patch):
            tokenizer.save_pretrained(part)
    return target


def _adapter(folder: Path, out: Path | None) -> Path:
    """The folder of the run's adapter, or a copy of it."""
    own = folder / "adapter"
    if not own.is_dir():
        read_summary(folder)  # says so where it is no run, or not finished
        require_model(folder)
        student = (folder / "recipe.yaml").is_file() and recipe_of(folder).model.student is not None
        raise LichenError("has no adapter", where=str(folder), fix=STUDENT_FIX if student else "use --merge")
    check_artifacts(folder)
    if out is None:
        return own
    require_empty(out)
    with whole_folder(out) as draft:
        shutil.copytree(own, draft, dirs_exist_ok=True)
        share(draft)
    return out


def require_empty(out: Path) -> None:
    """Refuse a place at which something lies that is no empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LichenError("is not empty", where=f"--out {out}", fix="choose another folder")
