"""Says what the next stage of a recipe begins with: the last one's adapter, or the whole model that it gave.

An adapter goes on as it is where the next stage trains the same adapter of the same base for the same task. Anything
else begins with a whole model: the one that was trained whole, or the adapter merged into its base.
"""

from __future__ import annotations

from typing import Literal

from lichen.core.errors import LichenError
from lichen.recipes.schema.recipe import Recipe

__all__ = ["ORIGIN", "Begins", "begins_with", "refuse_context"]

Begins = Literal["anew", "base", "start"]
"""A model of the recipe's own; the whole model of the stage before; its adapter."""

ORIGIN = (
    "model.name",
    "model.scratch",
    "model.student",
    "model.students",
    "model.layers",
    "model.random",
    "model.adapter.init_from",
)
"""Keys that say what a model begins as: the first stage's alone."""


def begins_with(before: Recipe, after: Recipe, *, name: str) -> Begins:
    """What a stage takes from the one before it.

    Args:
        before: The recipe of the stage before; what it begins with is filled in.
        after: The recipe of the stage.
        name: What the stage before is called.

    Raises:
        LichenError: if it gives nothing that this stage can begin with; ``where`` is a key of the stage.
    """
    _refuse_end(before, name)
    if after.writes and not before.writes:
        raise LichenError(
            f"task {after.task} needs a model that writes, and stage {name} gives one that tells classes",
            where="task",
            fix=f"put this stage before {name}",
        )
    if _same_adapter(before, after):
        return "start"
    kind = before.model.adapter.kind
    if before.model.adapter.facts.whole:
        return "base"
    from lichen.models.adapters.kind import kind_of

    if kind_of(kind).merge is None:
        raise LichenError(
            f"stage {name} gives a {kind} adapter, which no weights can take in, and this stage trains another one",
            where="model.adapter",
            fix=f"let both stages train the same {kind} adapter for one task, or use kind: lora in stage {name}",
        )
    if before.model.quantize is not None:
        raise LichenError(
            f"the adapter of stage {name} cannot be merged into a base in {before.model.quantize}, and this stage "
            "trains another adapter",
            where="model.quantize",
            fix=f"leave it out of stage {name}, or let both stages train the same adapter",
        )
    return "base"


def _refuse_end(before: Recipe, name: str) -> None:
    """Refuse a stage after one whose result is no model that a run can begin with."""
    small = before.model.student is not None or bool(before.model.students)
    if small or (before.model.name is None and before.model.scratch is None):
        what = f"stage {name} trains a student, from which no other stage can begin"
    elif before.method.asks_only:
        what = f"stage {name} finds a prompt by asking, which lies outside the model"
    elif before.aggregation.local_params and not before.model.adapter.facts.whole:
        what = f"stage {name} leaves a part of each adapter with its client, and gives none that is whole"
    else:
        from lichen.tasks.registry import task_of

        if task_of(before.task).procedure.rounds:
            return
        what = f"task {before.task} of stage {name} solves for a head, and trains no model"
    raise LichenError(what, where="", fix=f"let {name} be the last stage, or give it another task, model or rule")


def _same_adapter(before: Recipe, after: Recipe) -> bool:
    """Whether the adapter can go on: what is trained, on what base, and what for, are the same."""
    one, other = before.model, after.model
    if one.adapter.facts.whole or before.task != after.task:
        return False
    adapters = [section.adapter.model_copy(update={"init_from": None}) for section in (one, other)]
    bases = [(section.dtype, section.quantize, section.head) for section in (one, other)]
    redrawn = one.random and before.seed != after.seed
    if adapters[0] != adapters[1] or bases[0] != bases[1] or redrawn or before.aggregation.patch is not None:
        return False
    from lichen.models.adapters.kind import kind_of

    return kind_of(one.adapter.kind).peft is not None


def refuse_context(first: Recipe, after: Recipe, *, name: str) -> None:
    """Refuse a stage that the model from nothing of the first one cannot serve.

    Args:
        first: The recipe of the first stage.
        after: The recipe of a later stage.
        name: What the first stage is called.

    Raises:
        LichenError: if its rows are longer than that model reads, or in a form that it has no template for.
    """
    if first.model.scratch is None:
        return
    if after.data.max_length > first.data.max_length:
        raise LichenError(
            f"rows of {after.data.max_length} tokens are longer than the {first.data.max_length} that the model of "
            f"stage {name} can look at",
            where="data.max_length",
            fix=f"set it to {first.data.max_length} or less, or that of stage {name} to {after.data.max_length}",
        )
    if after.templated and after.data.template is None:
        raise LichenError(
            f"the model of stage {name} is from nothing, and has no chat template",
            where="data.template",
            fix="name a Jinja file, or set data.form to transcript or plain",
        )
