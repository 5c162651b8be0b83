"""Reads a comparison: a base recipe and the changes of each method.

``question`` · ``base`` (a recipe's name or file) · ``set`` (keys changed for all) · ``seeds`` ·
``methods`` (a name each, with the keys it changes). Keys are dotted or nested, and a nested section
changes what it names and leaves the rest. A later word wins: base, ``set``, the level, the method, the
command line.

``levels`` (a name each, with keys) asks every method the same question under several conditions, such as fewer
labels; ``at`` names the levels of methods that are not run at all of them. ``also`` shows another column of a
method's runs as a row: ``{alone: scratch}``, or of several methods: ``{personal: [ditto, apfl]}``.

Every method is read as the recipe it makes before anything runs, so that a slip in the thirtieth one
does not wait for the twenty-ninth to finish; and two methods that make one recipe are refused,
because they would be compared with themselves.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.recipes.comparison_sections import (
    as_overrides,
    check_name,
    read_also,
    read_at,
    read_base,
    read_changes,
    read_levels,
    read_seeds,
    refuse_seed,
)
from lichen.recipes.schema.read import gallery, read_with_notes, recipe_sha256
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.renamed_keys import report_renamed
from lichen.recipes.schema.yaml import LARGEST, load_yaml

__all__ = ["Comparison", "Method", "card_of", "comparisons", "read_comparison"]

KEYS = ("name", "question", "base", "set", "seeds", "levels", "methods", "at", "also")
SEEDS = (0, 1, 2)
"""Where nobody says which: the fewest that show a spread."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of the table.

    Attributes:
        name: What it is called; with levels ``method@level``.
        recipe: What it runs, its seed 0.
        also: Columns of its runs, beside federated, that are rows of their own: ``(row, column)``.
    """

    name: str
    recipe: Recipe
    also: tuple[tuple[str, str], ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is run.

    Attributes:
        name: What it is called.
        question: What it answers.
        methods: In the order of the table.
        seeds: Each method runs with each of them.
        levels: Conditions that methods are run under, in order; none: one, without a name.
    """

    name: str
    question: str
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    levels: tuple[str, ...] = ()

    def named(self, names: Sequence[str], *, where: str) -> tuple[str, ...]:
        """These names, each of a method or of one at a level (``method@level``).

        Raises:
            LichenError: for a name that no method has.
        """
        there = list(dict.fromkeys(method.name.partition("@")[0] for method in self.methods))
        known = {*there, *(method.name for method in self.methods)}
        for name in names:
            if name not in known:
                raise LichenError(f"no method {name!r}", where=where, fix=f"the methods are: {', '.join(there)}")
        return tuple(names)


def comparisons() -> dict[str, Path]:
    """The comparisons that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "comparisons").glob("*.yaml"))}


def read_comparison(
    sources: Sequence[str | Path],
    *,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    note: Callable[[str], None] | None = None,
) -> Comparison:
    """Read recipes, or one comparison, and check every method.

    Args:
        sources: Recipes as :func:`lichen.recipes.schema.read.read_recipe` knows them, or one comparison's file or name.
        overrides: ``key.sub=value`` for all methods.
        seeds: Instead of the comparison's own.
        note: Called with a line on old names of keys; None warns of them.

    Raises:
        LichenError: for the first fault found, with its method and key.
    """
    if not sources:
        raise LichenError("no recipe", where="comparison", fix="name recipes, or a comparison")
    for text in overrides:
        refuse_seed(text.partition("=")[0].strip(), f"-s {text}")
    pages = [(source, _page(source)) for source in sources]
    found = [(source, page) for source, page in pages if page is not None]
    if found and len(pages) > 1:
        raise LichenError(
            "is a comparison, and stands beside others", where=str(found[0][0]), fix="name one comparison, or recipes"
        )
    renamed: list[str] = []
    if found:
        source, page = found[0]
        known = _comparison(page, str(source), _folder_of(source), overrides, renamed)
    else:
        known = _join_recipes(sources, overrides, renamed)
    report_renamed(renamed, note)
    _differ(known.methods)
    chosen = known.seeds if seeds is None else read_seeds(list(seeds), "seeds")
    return replace(known, seeds=chosen)


def card_of(name: str) -> tuple[int, int, str]:
    """``(methods, seeds, question)`` of a comparison that comes with the package, without reading its recipes."""
    page = _page(name) or {}
    levels, at = page.get("levels") or {"": {}}, page.get("at") or {}
    methods = sum(len(at.get(row, levels)) for row in page["methods"])
    return methods, len(page.get("seeds", SEEDS)), page.get("question", "")


def _folder_of(source: str | Path) -> Path:
    """The file of a comparison."""
    shipped = comparisons()
    return shipped[source] if isinstance(source, str) and source in shipped else Path(source)


def _page(source: str | Path) -> Mapping[str, Any] | None:
    """What a comparison's file holds; None if the source is a recipe, or nothing that can be read as one."""
    path = _folder_of(source)
    if isinstance(source, str) and source in gallery():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return None  # the reader of recipes says what is amiss
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError):
        return None
    value = load_yaml(text, where=str(source))
    return value if isinstance(value, Mapping) and ("methods" in value or "base" in value) else None


def _join_recipes(sources: Sequence[str | Path], overrides: Sequence[str], renamed: list[str]) -> Comparison:
    read = [_read(source, overrides, renamed) for source in sources]
    for position, recipe in enumerate(read):
        check_name(recipe.name, f"{sources[position]}: name")
        if recipe.name in [other.name for other in read[:position]]:
            raise LichenError(
                f"two recipes are called {recipe.name!r}", where=str(sources[position]), fix="give one another name"
            )
    methods = tuple(Method(name=r.name, recipe=_seeded(r, 0)) for r in read)
    name = re.sub(r"[^\w.+-]", "-", "-".join(r.name for r in read))[:60]
    return Comparison(name=name, question=read[0].question if len(read) == 1 else "", methods=methods, seeds=SEEDS)


def _read(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    renamed: list[str],
    *,
    of: Sequence[str] | None = None,
) -> Recipe:
    """A recipe; ``renamed`` gets a note for each old name of a key, and those of ``of`` must have a reader."""
    recipe, notes = read_with_notes(source, overrides, of=of)
    renamed += notes
    return recipe


def _comparison(
    page: Mapping[str, Any], where: str, file: Path, overrides: Sequence[str], renamed: list[str]
) -> Comparison:
    for key in page:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise LichenError("unknown key", where=f"{where}: {key}", fix=f"{hint}a comparison has: {', '.join(KEYS)}")
    name, question = page.get("name", file.stem), page.get("question", "")
    check_name(name, f"{where}: name")
    if not isinstance(question, str):
        raise LichenError("must be a text", where=f"{where}: question", fix="put it in quotes")
    base = read_base(page.get("base"), f"{where}: base", file, renamed)
    common = read_changes(page.get("set"), f"{where}: set", renamed)
    rows = page.get("methods")
    if not isinstance(rows, Mapping) or not rows:
        raise LichenError(
            "must hold a name for each method, with the keys it changes",
            where=f"{where}: methods",
            fix="for example fedex: {federation.aggregate: fedex}",
        )
    levels = read_levels(page.get("levels"), f"{where}: levels", renamed)
    at = read_at(page.get("at"), rows, levels, f"{where}: at")
    also = read_also(page.get("also"), rows, f"{where}: also")
    methods = []
    for row, changes in rows.items():
        here = f"{where}: methods.{row}"
        check_name(row, here)
        own = as_overrides(read_changes(changes, here, renamed))
        for level in at.get(row, tuple(levels)):
            name_ = f"{row}@{level}" if level else row
            words = [*as_overrides(common), *as_overrides(levels[level]), *own, *overrides, f"name={json.dumps(name_)}"]
            try:
                recipe = _read(base, words, renamed, of=own)  # what is common may say nothing to some methods
            except LichenError as error:
                place = here if not level else f"{here}, level {level}"
                raise LichenError(error.what, where=f"{place}: {error.where}", fix=error.fix) from None
            methods.append(Method(name=name_, recipe=_seeded(recipe, 0), also=also.get(row, ())))
    seeds = read_seeds(page["seeds"], f"{where}: seeds") if "seeds" in page else SEEDS
    return Comparison(
        name=name,
        question=question,
        methods=tuple(methods),
        seeds=seeds,
        levels=tuple(level for level in levels if level),
    )


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed})


def _differ(methods: Sequence[Method]) -> None:
    """Refuse two methods that are one recipe."""
    seen: dict[str, str] = {}
    for method in methods:
        digest = recipe_sha256(method.recipe.model_copy(update={"name": "", "question": ""}))
        if digest in seen:
            raise LichenError(
                f"is the same recipe as {seen[digest]}", where=f"methods.{method.name}", fix="change or remove one"
            )
        seen[digest] = method.name
