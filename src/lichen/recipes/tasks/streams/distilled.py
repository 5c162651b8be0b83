"""Lets an adapter of another base learn, at the server, what the model in force answers; a period begins from it.

``distilled`` in the stream's folder is an ordinary run over the answers, which lie in it. It is whole by its own list
of files, goes on after a stop, and is never made again. What is learned need not have the old adapter's shapes.

References: those of :mod:`lichen.recipes.artifacts.distil.answers` and :mod:`lichen.recipes.rebase.run`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lichen.core import private
from lichen.core.errors import LichenError
from lichen.core.files.manifest import MANIFEST
from lichen.data.sources.catalog import resolve_model
from lichen.models.peft.merge import attach
from lichen.recipes.artifacts.distil.answers import ANSWERS, questions, write_answers
from lichen.recipes.artifacts.distil.learned import learning
from lichen.recipes.artifacts.use.finished import open_models
from lichen.recipes.assemble.bases.in_force import on_base
from lichen.recipes.assemble.chat_template import put_template
from lichen.recipes.assemble.model import foundation_of, spec_of
from lichen.recipes.schema.read import MOVABLE, different_keys, read_recipe, recipe_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.tasks.streams.folders import START
from lichen.recipes.tasks.streams.scores import Scores

__all__ = ["count_answers", "distil", "require_questions"]

RunOne = Callable[..., object]


def require_questions(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """The questions of ``stream.rebase.prompts``; none where they are answered, or none are asked.

    Args:
        recipe: The stream's.
        folder: Of the distilled run.

    Raises:
        LichenError: if they cannot be read, or are too few.
    """
    rebase = None if recipe.stream is None else recipe.stream.rebase
    if rebase is None or rebase.how != "distil" or (folder / ANSWERS).exists():
        return ()
    return questions((), Path(str(rebase.prompts)).expanduser(), where="stream.rebase.prompts")


def distil(scores: Scores, period: str, model: str, base: str, say: Callable[[str], None], run: RunOne) -> None:
    """Write the answers and learn them, or go on with that; what is finished is only looked at.

    Args:
        scores: Opens periods.
        period: That is trained on the new base first.
        model: In force, whose answers are learned: a period or ``START``.
        base: The new one.
        say: Called with lines of progress.
        run: Runs a recipe in a folder.

    Raises:
        LichenError: if the model writes too few answers, or another recipe's run lies there.
    """
    periods = scores.periods
    target, recipe = periods.distilled, periods.recipe
    own = _recipe_of(recipe, base, target / ANSWERS)
    if (target / MANIFEST).exists():
        changed = different_keys(recipe_of(target), own)
        if others := [key for key in changed if key not in MOVABLE]:
            what = f"was made by another recipe: {', '.join(others[:6])}"
            raise LichenError(what, where=str(target), fix="put the folder of then back")
        return
    prompts = require_questions(recipe, target)
    if prompts:
        if not target.exists():
            private.make_folder(target)
        writer, tokenizer = _writer(scores, period, model)
        write_answers(target / ANSWERS, recipe, writer, tokenizer, prompts, where="stream.rebase.how: distil", say=say)
        del writer
        gc.collect()
    say(f"period {period}: an adapter of {base} learns {count_answers(target)} answers at the server")
    run(own, out=target, resume=True, say=say)


def count_answers(folder: Path) -> int:
    """How many answers were learned.

    Raises:
        LichenError: if they are gone.
    """
    try:
        return len((folder / ANSWERS).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError):
        raise LichenError("cannot be read", where=str(folder / ANSWERS), fix="put it back from a copy") from None


def _recipe_of(recipe: Recipe, base: str, answers: Path) -> Recipe:
    values: dict[str, Any] = on_base(recipe, base).model_dump(mode="json", exclude_defaults=True)
    values["model"].get("adapter", {}).pop("init_from", None)
    return read_recipe({**learning(values, recipe, answers), "name": f"{recipe.name} distilled"})


def _writer(scores: Scores, period: str, model: str) -> tuple[Any, Any]:
    """The model in force on its own base, as it writes, and its tokenizer."""
    if model != START:
        _, _, writer, tokenizer = open_models(scores.periods.of(model))
        return writer, tokenizer
    base = scores.periods.base_of(START)
    shared = scores.open(period, base).experiment.start
    scores.clear()
    recipe = on_base(scores.periods.recipe, base)
    bare, tokenizer = foundation_of(recipe, resolve_model(base), 0)
    put_template(recipe, tokenizer)
    return attach(bare, shared.trainable, shared.patch, spec=spec_of(recipe, bare)), tokenizer
