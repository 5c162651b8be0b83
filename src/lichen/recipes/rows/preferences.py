"""What of the rows of task prefer is learned: pairs that differ, and ratings that say good or bad."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.sources.records import PREFERENCES, Record
from lichen.data.sources.table import column_of
from lichen.recipes.schema.recipe import Recipe

__all__ = ["differing_pairs", "goods_of", "refuse_preferences", "scarce_clients", "unread_roles"]


def unread_roles(recipe: Recipe) -> tuple[str, ...]:
    """Roles that nobody asks for; a column that bears such a role's name is no matter."""
    if not recipe.prefers:
        return (*(("label",) if recipe.writes else ()), *PREFERENCES)
    return ("label",) if recipe.rated else ("label", "rating")


def goods_of(recipe: Recipe, records: Sequence[Record]) -> np.ndarray:
    """``(N,)``: 1 for a good row, 0 for a bad one, -1 for one in between or without a rating, int64.

    Rows of pairs are good, and so are all rows where none has a rating.
    """
    ratings = column_of(records, "rating")
    if not recipe.rated:
        return np.ones(len(records), dtype=np.int64)
    good, bad = _bounds(recipe, ratings)
    known = [np.nan if one is None else one for one in ratings]
    rating_N = np.asarray(known, dtype=np.float64)
    return np.where(rating_N >= good, 1, np.where(rating_N <= bad, 0, -1)).astype(np.int64)


def differing_pairs(recipe: Recipe, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """``(N,)`` twice: rows that have both answers, and rows whose two answers are the same but for blanks, bool.

    Where rows are rated, or stand against the model's own answers, there are no pairs: all have one, and none is the
    same.
    """
    count = len(records)
    texts, rejected = column_of(records, "text"), column_of(records, "rejected")
    if recipe.rated or recipe.preference.writes_answers or not any(rejected):
        return np.ones(count, dtype=bool), np.zeros(count, dtype=bool)
    answers = [(a.strip(), b.strip()) for a, b in zip(texts, rejected, strict=True)]
    return np.array([bool(a and b) for a, b in answers], dtype=bool), np.array([a == b for a, b in answers], dtype=bool)


def scarce_clients(recipe: Recipe, records: Sequence[Record]) -> frozenset[str]:
    """The clients with fewer good or bad rows than the recipe wants of each.

    Raises:
        LichenError: if nobody has as many.
    """
    least = (recipe.preference.min_bad, recipe.preference.min_good)
    if not any(least):
        return frozenset()
    names, good_N = column_of(records, "client"), goods_of(recipe, records).tolist()
    rows = Counter(zip(names, good_N, strict=True))
    scarce = frozenset(name for name in names if any(rows[name, kind] < least[kind] for kind in (0, 1)))
    if scarce == frozenset(names):
        raise LichenError(
            f"no client has {least[1]} good and {least[0]} bad rows",
            where="prefer.min_bad" if least[0] else "prefer.min_good",
            fix="lower it, or move the bounds prefer.good and prefer.bad",
        )
    return scarce


def _bounds(recipe: Recipe, ratings: Sequence[float | None]) -> tuple[float, float]:
    config = recipe.preference
    if config.good is not None and config.bad is not None:
        return config.good, config.bad
    found = sorted({one for one in ratings if one is not None})
    if not set(found) <= {0.0, 1.0}:
        raise LichenError(
            f"ratings go from {found[0]:g} to {found[-1]:g}, and nothing says which are good",
            where="prefer.good",
            fix=f"set prefer.good and prefer.bad, such as {found[-1]:g} and {found[0]:g}: from which rating on a row "
            "is good, and up to which it is bad",
        )
    return 1.0, 0.0


def refuse_preferences(recipe: Recipe, records: Sequence[Record], *, elsewhere: bool = False) -> None:
    """Refuse rows from which the recipe's kind of preference cannot be learned.

    Args:
        recipe: Of task prefer.
        records: All rows.
        elsewhere: These are one site's, and others may have good or bad rows where this one has none.

    Raises:
        LichenError: by the key of the column or bound at fault.
    """
    rejected, ratings = column_of(records, "rejected"), column_of(records, "rating")
    config, pairs, rated = recipe.preference, any(rejected), any(one is not None for one in ratings)
    if recipe.rated and not rated:
        raise LichenError(
            f"{config.kind} learns from rows that are good or bad, and no row has a rating",
            where="data.columns.rating",
            fix="name the column, or learn from pairs by prefer.kind: dpo",
        )
    if (recipe.rated or config.writes_answers) and pairs:
        raise LichenError(
            "rows have a rejected answer each, and are to be taken one by one",
            where="data.columns.rejected",
            fix="leave the column out, or use prefer.kind: dpo",
        )
    if not recipe.rated and not config.writes_answers and not pairs:
        raise LichenError(
            f"{config.kind} learns from a better and a worse answer to one prompt, and no row has a worse one",
            where="data.columns.rejected",
            fix="name the column, or learn from ratings by prefer.kind: kto",
        )
    if config.facts.needs == "rejected" and recipe.rated and not config.writes_answers:
        raise LichenError(
            f"{config.kind} learns from pairs of answers, and not from ratings",
            where="data.columns.rating",
            fix="leave the column out, or use prefer.kind: kto",
        )
    if recipe.rated:
        _refuse_ratings(recipe, records, elsewhere=elsewhere)
        return
    there_N, same_N = differing_pairs(recipe, records)
    if not (there_N & ~same_N).any():
        raise LichenError(
            "no row has a chosen and a rejected answer that differ, so that nothing can be preferred",
            where="data.columns.rejected",
            fix="name another column",
        )


def _refuse_ratings(recipe: Recipe, records: Sequence[Record], *, elsewhere: bool) -> None:
    found = {one for one in column_of(records, "rating") if one is not None}
    if len(found) == 1 and not elsewhere:
        raise LichenError(
            f"every rating is {next(iter(found)):g}, so that no row is better than another",
            where="data.columns.rating",
            fix="name a column of ratings that differ",
        )
    good_N = goods_of(recipe, records)
    for value, key, way in ((1, "good", "lower"), (0, "bad", "raise")):
        if not (good_N == value).any() and not elsewhere:
            raise LichenError(
                f"no row is {key}: ratings go from {min(found):g} to {max(found):g}",
                where=f"prefer.{key}",
                fix=f"{way} it",
            )
