"""Reads and writes recipes: gallery name, YAML file or mapping, and ``key.sub=value``.

A recipe is read strictly. Text is not taken for a number nor ``true`` for 1, because a typing slip
in an experiment is not seen again once the run has started. Two kindnesses remain: a single value
stands for a list of one, and ``2e3`` is a whole number. Keys that have got a new name are read under the
old one, too, for a release (:mod:`lichen.recipes.schema.renamed_keys`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.recipes.schema.idle import changed_keys, idle_keys
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.renamed_keys import report_renamed, with_new_names, with_old_names
from lichen.recipes.schema.strict import check, plain, read_mapping, text_of
from lichen.recipes.schema.yaml import dump_yaml, load_yaml

__all__ = [
    "MOVABLE",
    "anchor",
    "different_keys",
    "former_sha256",
    "gallery",
    "lay",
    "leave_out",
    "locate",
    "new_folder",
    "override",
    "read_recipe",
    "read_values",
    "read_with_notes",
    "recipe_of",
    "recipe_sha256",
    "staged_gallery",
    "write_recipe",
]

_PATHS = (
    ("data", "name"),
    ("data", "cards"),
    ("model", "name"),
    ("model", "adapter", "init_from"),
    ("compare", "proxy"),
    ("stream", "rebase", "model"),
    ("stream", "rebase", "prompts"),
    ("teacher", "name"),
    ("synthetic", "name"),
    ("synthetic", "embedder"),
    ("teacher", "endpoint", "filter", "names"),
    ("synthetic", "endpoint", "filter", "names"),
)


MOVABLE = (
    "data.name",
    "model.name",
    "model.adapter.init_from",
    "stream.rebase.model",
    "stream.rebase.prompts",
    "cache_dir",
)
"""Keys that say where something lies, and may change while a run goes on."""


def gallery() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parents[1] / "gallery").glob("*.yaml"))}


def staged_gallery() -> dict[str, Path]:
    """The recipes of several stages that come with the package, by name."""
    return {file.stem: file for file in sorted((Path(__file__).parents[1] / "staged").glob("*.yaml"))}


def locate(source: str | Path) -> Path:
    """The file of a recipe.

    Raises:
        LichenError: if there is none.
    """
    shipped = gallery() | staged_gallery()
    if isinstance(source, str) and source in shipped:
        return shipped[source]
    path, shown = Path(source), str(source)
    try:
        if path.is_dir():
            inside = path / "recipe.yaml"
            fix = f"name the file: {inside}" if inside.is_file() else "name a YAML file, not a folder"
            raise LichenError("is a folder", where=shown or ".", fix=fix)
        if path.is_file():
            return path
    except (OSError, ValueError):
        shown = shown if len(shown) <= 60 else shown[:56] + " ..."
    close = difflib.get_close_matches(path.stem, list(shipped), n=3, cutoff=0.5)
    fix = f"did you mean {' or '.join(map(repr, close))}?" if close else "give a YAML file or a name of the gallery"
    names = f"; the gallery has: {', '.join(shipped)}" if shipped else ""
    raise LichenError("no such recipe", where=shown, fix=fix + names)


def _read_file(path: Path) -> Mapping[str, Any]:
    fix = "start from `lichen init DATA`, or from a recipe of the gallery"
    return read_mapping(text_of(path, kind="recipe"), where=str(path), kind="recipe", fix=fix)


def override(recipe: dict[str, Any], text: str) -> list[str]:
    """Set one key as ``key.sub=value`` says; notes on its old names.

    Raises:
        LichenError: if the text is nothing of the kind.
    """
    key, sign, written = text.partition("=")
    key = key.strip()
    if not sign or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise LichenError("is not key=value", where=f"-s {text}", fix="write it like -s optimizer.lr=1e-3")
    return lay(recipe, key, plain(load_yaml(written, where=f"-s {text}"), key))


def lay(recipe: dict[str, Any], key: str, value: Any) -> list[str]:
    """Set one key, by its dotted name, among the values of a recipe; notes on its old names.

    Raises:
        LichenError: if there is no section that could hold it.
    """
    *outer, last = key.split(".")
    new, notes = with_new_names({last: value}, "".join(f"{step}." for step in outer))
    mapping: dict[str, Any] = recipe
    for position, step in enumerate(outer):
        inner = mapping.get(step)
        if inner is None:
            inner = mapping[step] = {}
        if not isinstance(inner, dict):
            place = ".".join(outer[: position + 1])
            raise LichenError(f"{place} is a value, not a section", where=key, fix=f"set it as -s {place}=VALUE")
        mapping = inner
    mapping.update(new)
    return notes


def anchor(recipe: dict[str, Any], folder: Path) -> None:
    """Make paths that exist beside the recipe absolute; all others are left to the working directory."""
    for *outer, last in _PATHS:
        mapping: Any = recipe
        for step in outer:
            mapping = mapping.get(step) if isinstance(mapping, dict) else None
        value = mapping.get(last) if isinstance(mapping, dict) else None
        if not isinstance(value, str) or not value or "\0" in value or len(value) > 1000 or Path(value).is_absolute():
            continue
        sibling = folder / value
        try:
            there = sibling.exists()
        except OSError:
            continue
        if there and not _catalogued(value):
            mapping[last] = str(sibling.resolve())


def _catalogued(name: str) -> bool:
    """Whether a name means a known data set or model, though a folder of that name lies beside the recipe."""
    try:
        from lichen.data.sources.catalog import CATALOG
        from lichen.data.sources.datasets import declared_datasets
    except ImportError:
        return False
    return name in CATALOG or name in declared_datasets()


def new_folder(name: str) -> Path:
    """The first unused ``runs/<name>-<n>``."""
    stem = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder


def read_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    note: Callable[[str], None] | None = None,
) -> Recipe:
    """Read a recipe and check every key of it.

    A key that nobody reads beside the recipe's others is refused (:mod:`lichen.recipes.schema.idle`), unless it was
    fine in the file and only the overrides leave it without a reader; then ``note`` is told.

    Relative paths of data and models mean the recipe file's own folder if they exist there, else
    the working directory.

    Args:
        source: A name of the gallery, a YAML file, or a mapping.
        overrides: ``key.sub=value`` with a YAML value, applied in order.
        note: Called with a line on old names of keys, of which None warns, and on keys without a reader.

    Returns:
        The recipe.

    Raises:
        LichenError: for the first fault found, with the dotted key and the fix.

    >>> chat = {"task": "chat", "model": {"name": "tiny"}, "data": {"name": "rows.jsonl"}}
    >>> read_recipe(chat, ["optimizer.lr=1e-3"]).optimizer.lr
    (0.001,)
    """
    values, notes = _values(source, overrides)
    report_renamed(notes, note)
    recipe = check(Recipe, values)
    faults = _refuse_idle(recipe, source, overrides, of=overrides)
    for fault in faults:
        leave_out(values, fault.where)
        if note is not None:
            note(f"{fault.where}: {fault.what}; left out")
    return check(Recipe, values) if faults else recipe


def recipe_of(folder: Path, overrides: Sequence[str] = (), *, note: Callable[[str], None] | None = None) -> Recipe:
    """The recipe of a run's folder, read like any other, but without notes on its own keys: nobody wrote them.

    Keys that nobody reads stay: it may be of a version that did not refuse them, and has run as it is.

    Args:
        folder: The run's, or its file.
        overrides: ``key.sub=value``, applied in order.
        note: Called with a line on old names in ``overrides``; None warns of them.

    Raises:
        LichenError: for the first fault found.
    """
    values, _ = _values(folder if folder.is_file() else folder / "recipe.yaml", ())
    report_renamed([message for text in overrides for message in override(values, text)], note)
    return check(Recipe, values)


def read_with_notes(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, of: Sequence[str] | None = None
) -> tuple[Recipe, tuple[str, ...]]:
    """As :func:`read_recipe`, with a note for each old name in place of telling them.

    Args:
        source: A name of the gallery, a YAML file, or a mapping.
        overrides: ``key.sub=value`` with a YAML value, applied in order.
        of: The overrides whose keys must have a reader; None: all of them.
    """
    values, notes = _values(source, overrides)
    recipe = check(Recipe, values)
    _refuse_idle(recipe, source, overrides, of=overrides if of is None else of)
    return recipe, tuple(notes)


def _refuse_idle(
    recipe: Recipe, source: str | Path | Mapping[str, Any], overrides: Sequence[str], *, of: Sequence[str]
) -> list[LichenError]:
    """Refuse a key that nobody reads; those that overrides have left so are given back.

    Args:
        recipe: As it was read.
        source: What it was read from.
        overrides: What was changed in it.
        of: The changes that are held to account.

    Raises:
        LichenError: for the first such key of ``of``, or of the source where it has no reader there either.
    """
    if not (faults := list(idle_keys(recipe))):
        return []
    before: set[str] = set()
    if overrides:
        with suppress(LichenError):  # a recipe that the overrides mend was not fine in the file
            before = set(changed_keys(alone := check(Recipe, _values(source, ())[0])))
            before -= {fault.where for fault in idle_keys(alone)}
    mine = tuple(f"{text.partition('=')[0].strip()}." for text in of)
    others = tuple(f"{text.partition('=')[0].strip()}." for text in overrides if text not in of)
    for fault in faults:
        inherited = fault.where in before or f"{fault.where}.".startswith(others)
        if not inherited or f"{fault.where}.".startswith(mine):
            raise fault
    return faults


def read_values(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What a recipe says, unchecked, for those who read it many times with other values; and a note for each old name.

    Raises:
        LichenError: if it cannot be read.
    """
    if isinstance(source, Mapping):
        return with_new_names(plain(source, "recipe"))
    if isinstance(source, (str, Path)):
        path = locate(source)
        values, notes = with_new_names(plain(_read_file(path), "recipe"))
        anchor(values, path.parent)
        return values, notes
    raise LichenError(
        f"cannot be read from a {type(source).__name__}", where="recipe", fix="give a name, a path or a mapping"
    )


def _values(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a recipe of one run says, under the new names of keys, and a note for each old one."""
    values, notes = read_values(source)
    if "stages" in values:
        raise LichenError(
            "the recipe is several runs, one after another, where one run is asked for",
            where="stages",
            fix="lichen run and lichen plan take it on one machine; anywhere else give its stages one after another, "
            "each as a recipe of its own that begins with what the one before has given",
        )
    for text in overrides:
        notes += override(values, text)
    return values, notes


def leave_out(values: dict[str, Any], key: str) -> None:
    """Remove a key, by its dotted name."""
    *outer, last = key.split(".")
    for step in outer:
        values = values[step]
    del values[last]


def write_recipe(recipe: Recipe) -> str:
    """YAML with every key, which :func:`read_recipe` reads back equal."""
    return dump_yaml(recipe.model_dump(mode="json"))


def different_keys(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ, sorted."""
    return _different(one.model_dump(mode="json"), other.model_dump(mode="json"))


def _different(one: Mapping[str, object], other: Mapping[str, object], path: str = "") -> list[str]:
    """The dotted keys in which two mappings differ.

    >>> _different({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    ['a.c', 'd']
    """
    found: list[str] = []
    for key in sorted({*one, *other}):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            found += _different(mine, theirs, f"{path}{key}.")
        elif mine != theirs:
            found.append(f"{path}{key}")
    return found


def recipe_sha256(recipe: Recipe) -> str:
    """SHA-256 over the recipe as canonical JSON (64 hex digits): equal recipes, however written, are equal here.

    Keys at their default are left out, so that a key that a later version adds makes no other recipe of an old one.
    """
    return _sha256(recipe.model_dump(mode="json", exclude_defaults=True))


def former_sha256(recipe: Recipe) -> str:
    """What :func:`recipe_sha256` was before keys were renamed: by it a folder of that time is known."""
    return _sha256(with_old_names(recipe.model_dump(mode="json", exclude_defaults=True)))


def _sha256(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
