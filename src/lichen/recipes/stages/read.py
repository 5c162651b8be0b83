"""Reads a recipe of several stages: runs one after another, each of which begins with what the one before it gave.

``stages`` is a list; each item has a ``name`` and changes keys of the recipe around it, dotted or nested. A later word
wins: the recipe around, the stage, ``-s KEY=VALUE`` for all stages, ``-s stages.NAME.KEY=VALUE`` for one.

Every stage is read as the recipe of an ordinary run before the first one begins, so that a slip in the last of them
does not wait for hours. The keys that say what the model begins as are the first stage's; a later one has its name or
its adapter from the stage before (:mod:`lichen.recipes.stages.fits`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.recipes.comparison_sections import check_name
from lichen.recipes.schema.idle import idle_keys
from lichen.recipes.schema.read import (
    anchor,
    lay,
    leave_out,
    locate,
    override,
    read_recipe,
    read_values,
    recipe_of,
)
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.renamed_keys import report_renamed
from lichen.recipes.schema.strict import check
from lichen.recipes.schema.yaml import dump_yaml
from lichen.recipes.stages.fits import ORIGIN, Begins, begins_with, refuse_context

__all__ = ["Stage", "Staged", "page_of", "read_page", "write_page"]

MERGED, ADAPTER = "merged", "adapter"
"""In a stage's folder: its whole model, and its adapter."""

MOST = 99

Note = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of several.

    Attributes:
        name: What it is called.
        recipe: What it runs; what it takes from the stage before stands in it relative to the folder of all stages.
        begins: What it begins with.
        folder: Its folder within that of all stages.
    """

    name: str
    recipe: Recipe
    begins: Begins
    folder: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A recipe of several stages.

    Attributes:
        name: What it is called.
        question: What it answers.
        stages: In order.
    """

    name: str
    question: str
    stages: tuple[Stage, ...]

    def at(self, folder: Path, position: int) -> Recipe:
        """The recipe of a stage, with what it takes from the stage before where that lies.

        Args:
            folder: The folder of all stages.
            position: Of the stage, from 0.
        """
        recipe = self.stages[position].recipe
        if not position:
            return recipe
        model, folders = recipe.model, {stage.folder for stage in self.stages}
        changes: dict[str, Any] = {}
        if model.name is not None and Path(model.name).parts[0] in folders:
            changes["name"] = str((folder / model.name).absolute())
        if model.adapter.init_from is not None:
            there = str((folder / model.adapter.init_from).absolute())
            changes["adapter"] = model.adapter.model_copy(update={"init_from": there})
        return recipe.model_copy(update={"model": model.model_copy(update=changes)})


def read_page(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, note: Note | None = None
) -> Recipe | Staged:
    """Read a recipe of one run or of several stages, and check every key of it.

    Args:
        source: A name of the gallery, a YAML file, or a mapping.
        overrides: ``key.sub=value`` for every stage, or ``stages.NAME.key.sub=value`` for one.
        note: Called with a line on old names of keys; None warns of them.

    Raises:
        LichenError: for the first fault found, with its stage and key.
    """
    values, notes = read_values(source)
    if "stages" not in values:
        return read_recipe(source, overrides, note=note)
    folder = None if isinstance(source, Mapping) else locate(source).parent
    staged = _staged(values, overrides, folder, notes)
    report_renamed(notes, note)
    return staged


def page_of(folder: Path, overrides: Sequence[str] = (), *, note: Note | None = None) -> Recipe | Staged:
    """The recipe of a run's folder, or of the folder of several stages.

    Args:
        folder: The folder.
        overrides: As in :func:`read_page`.
        note: Called with a line on old names in ``overrides``; None warns of them.

    Raises:
        LichenError: for the first fault found.
    """
    values, _ = read_values(folder / "recipe.yaml")
    if "stages" not in values:
        return recipe_of(folder, overrides, note=note)
    return read_page(folder / "recipe.yaml", overrides, note=note)


def write_page(staged: Staged) -> str:
    """YAML with every key of every stage, which :func:`read_page` reads back equal."""
    page: dict[str, Any] = {"name": staged.name, "question": staged.question, "stages": []}
    for position, stage in enumerate(staged.stages):
        values = stage.recipe.model_dump(mode="json")
        for key in ("name", "question", *(ORIGIN if position else ())):
            leave_out(values, key)
        page["stages"].append({"name": stage.name, **values})
    return dump_yaml(page)


def _staged(values: dict[str, Any], overrides: Sequence[str], folder: Path | None, notes: list[str]) -> Staged:
    around, items = {**values}, values["stages"]
    del around["stages"]
    names = _names(items)
    to_stage = [text.partition("=")[0].strip().partition(".")[0] == "stages" for text in overrides]
    for_all = [text for text, one in zip(overrides, to_stage, strict=True) if not one]
    for_one = [_addressed(text, names) for text, one in zip(overrides, to_stage, strict=True) if one]
    page = copy.deepcopy(around)
    for text in for_all:
        notes += override(page, text)
    title = {"name": page.get("name", "recipe"), "question": page.get("question", "")}
    for key, text in title.items():
        if not isinstance(text, str):
            raise LichenError("must be a text", where=key, fix="put it in quotes")
    found: list[Stage] = []
    idle: list[dict[str, LichenError]] = []
    for position, (name, item) in enumerate(zip(names, items, strict=True)):
        try:
            given = _changed(around, item, notes)
            for text in for_all:
                notes += override(given, text)
            mine = [text for whose, text in for_one if whose == name]
            for text in mine:
                notes += override(given, text)
            own = {key for key, _ in _leaves(item)} | {text.partition("=")[0].strip() for text in mine}
            if folder is not None:
                anchor(given, folder)
            given |= {"name": f"{title['name']}-{name}", "question": title["question"]}
            stage, unread = _stage(name, position, given, own, found)
        except LichenError as error:
            where = f"stages.{name}: {error.where}" if error.where else f"stages.{name}"
            raise LichenError(error.what, where=where, fix=error.fix) from None
        found.append(stage)
        idle.append(unread)
    for key, fault in idle[0].items():
        if all(key in others for others in idle):
            raise fault  # it stands around the stages, and none of them reads it
    return Staged(name=title["name"], question=title["question"], stages=tuple(found))


def _names(items: Any) -> list[str]:
    """The stages' names.

    Raises:
        LichenError: if there are none, or one is missing, no name, or given twice.
    """
    if not isinstance(items, list) or not items or len(items) > MOST:
        raise LichenError(
            f"must be a list of stages, {MOST} at most, each with a name and the keys that it changes",
            where="stages",
            fix="for example [{name: chat, data.form: transcript}, {name: again, federation.rounds: 3}]",
        )
    names: list[str] = []
    for position, item in enumerate(items):
        where = f"stages[{position}]"
        if not isinstance(item, Mapping):
            raise LichenError(
                "must hold a name and the keys that it changes",
                where=where,
                fix="for example {name: chat, data.form: transcript}",
            )
        if item.get("name") is None:
            raise LichenError("has no name", where=where, fix="give it one, such as name: chat; it names its folder")
        check_name(item["name"], f"{where}.name")
        if item["name"] in names:
            raise LichenError(
                f"two stages are called {item['name']!r}", where=f"{where}.name", fix="give one another name"
            )
        for key in _WHOLE:
            _refuse_of_all(key, {str(one).partition(".")[0] for one in item}, f"stages.{item['name']}")
        names.append(item["name"])
    return names


_WHOLE = ("stages", "question")
"""What a stage has none of."""


def _refuse_of_all(key: str, given: Collection[str], where: str) -> None:
    """Refuse a key of the whole recipe in a stage.

    Raises:
        LichenError: if it is there.
    """
    if key in given:
        raise LichenError(f"{key} is of the whole recipe, and no stage has its own", where=where, fix="remove it there")


def _addressed(text: str, names: Sequence[str]) -> tuple[str, str]:
    """``(stage, key=value)`` of ``stages.NAME.key=value``.

    Raises:
        LichenError: if it names no stage, or none of the keys that a stage has.
    """
    rest = text.strip().removeprefix("stages").removeprefix(".")
    mine = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
    if mine is None:
        known = any(rest.partition("=")[0].strip() == name for name in names)
        what = "names no key of that stage" if known else "names no stage"
        fix = f"write it like -s stages.{names[-1]}.optimizer.lr=1e-3; the stages are: {', '.join(names)}"
        raise LichenError(what, where=f"-s {text}", fix=fix)
    rest = rest.removeprefix(f"{mine}.")
    key = rest.partition("=")[0].strip()
    for one in ("name", *_WHOLE):
        _refuse_of_all(one, (key.partition(".")[0],), f"-s {text}")
    if not key:
        raise LichenError(
            "names no key of that stage", where=f"-s {text}", fix=f"write it like -s stages.{mine}.seed=1"
        )
    return mine, rest


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a stage with their values."""
    for key, value in section.items():
        if prefix or key != "name":
            if isinstance(value, Mapping) and value:
                yield from _leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value


def _changed(around: Mapping[str, Any], item: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The recipe around with the keys of a stage laid over it.

    Raises:
        LichenError: if that changes nothing.
    """
    given = copy.deepcopy(dict(around))
    for key, value in _leaves(item):
        notes += lay(given, key, value)
    if given == around:
        raise LichenError(
            "changes nothing of the recipe around it",
            where="",
            fix="say what it does otherwise, such as data.form or federation.rounds, or remove it",
        )
    return given


def _stage(
    name: str, position: int, given: dict[str, Any], own: set[str], found: Sequence[Stage]
) -> tuple[Stage, dict[str, LichenError]]:
    """A stage, and the keys of the recipe around that it does not read."""
    folder = f"{position + 1}-{name}"
    if not position:
        recipe, idle = _checked(given, own)
        return Stage(name=name, recipe=recipe, begins="anew", folder=folder), idle
    before, first = found[-1], found[0]
    _refuse_origin(own, given, before.name)
    model = given.setdefault("model", {})
    if not isinstance(model, dict):
        check(Recipe, given)  # says what is amiss
    for key in ORIGIN:
        section = model.get("adapter") if key.startswith("model.adapter.") else model
        if isinstance(section, dict):
            section.pop(key.rpartition(".")[2], None)
    model["name"] = f"{before.folder}/{MERGED}"
    recipe, idle = _checked(given, own)
    begins = begins_with(before.recipe, recipe, name=before.name)
    refuse_context(first.recipe, recipe, name=first.name)
    if begins == "start":
        was = before.recipe.model
        adapter = recipe.model.adapter.model_copy(update={"init_from": f"{before.folder}/{ADAPTER}"})
        same = {"name": was.name, "layers": was.layers, "random": was.random, "adapter": adapter}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=same)})
    return Stage(name=name, recipe=recipe, begins=begins, folder=folder), idle


def _refuse_origin(own: set[str], given: Mapping[str, Any], before: str) -> None:
    for key in sorted(own):
        value: Any = given
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        if any(f"{key}.".startswith(f"{one}.") for one in ORIGIN) and value not in (None, False, [], {}):
            raise LichenError(
                f"a stage begins with what the one before it gave, here {before}, and this says otherwise",
                where=key,
                fix="remove it, or let it stand in the first stage",
            )


def _checked(given: dict[str, Any], own: set[str]) -> tuple[Recipe, dict[str, LichenError]]:
    """The recipe, without keys of the recipe around that nobody reads in this stage, and why not.

    Raises:
        LichenError: for a fault, and for a key of the stage itself that nobody reads.
    """
    recipe = check(Recipe, copy.deepcopy(given))
    faults = {fault.where: fault for fault in idle_keys(recipe)}
    for key, fault in faults.items():
        if any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in own):
            raise fault
        leave_out(given, key)
    return (check(Recipe, given) if faults else recipe), faults
