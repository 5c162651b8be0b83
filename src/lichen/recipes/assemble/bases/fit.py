"""Refuses a base on which an adapter of another base would mean something else."""

from __future__ import annotations

from typing import Any

from lichen.core.errors import LichenError
from lichen.data.sources.catalog import resolve_model
from lichen.recipes.assemble.model import foundation_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["require_fit"]


def require_fit(
    recipe: Recipe,
    old: Any,
    old_tokenizer: Any,
    classes: int,
    *,
    vocabulary: bool,
    shapes: bool,
    where: str,
    fix: str,
) -> None:
    """Load another base, and hold it against the old one.

    Args:
        recipe: Names the new base.
        old: The old base.
        old_tokenizer: Its tokenizer.
        classes: Of the task; 0 for a language model.
        vocabulary: It must have the vocabulary of the old one.
        shapes: It must have the shapes of the old one.
        where: What names the new base, for errors.
        fix: What to do where it does not fit.

    Raises:
        LichenError: if it cannot be loaded, or what must be the same is not.
    """
    try:
        new, tokenizer = foundation_of(recipe, resolve_model(str(recipe.model.name)), classes)
    except LichenError as error:
        raise LichenError(
            error.what, where=where if error.where == "model.name" else error.where, fix=error.fix
        ) from None
    if vocabulary and tokenizer.get_vocab() != old_tokenizer.get_vocab():
        raise LichenError("has another vocabulary than the base that the adapter was made on", where=where, fix=fix)
    ours, theirs = ({name: tuple(x.shape) for name, x in model.named_parameters()} for model in (old, new))
    if shapes and ours != theirs:
        odd = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))[0]
        now, then = (str(some.get(odd, "missing")) for some in (theirs, ours))
        raise LichenError(
            f"is of another shape than the adapter's base: {odd} is {now}, and was {then}", where=where, fix=fix
        )
