"""Checks what somebody wrote against a schema, strictly: a recipe, or a site's policy.

Text is not taken for a number nor ``true`` for 1; two kindnesses remain: a single value stands for a list of one, and
``2e3`` is a whole number. Whatever is wrong is one sentence with its key.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lichen.core.errors import LichenError
from lichen.recipes.schema.explain import explain, section_of
from lichen.recipes.schema.yaml import LARGEST, load_yaml

__all__ = ["check", "plain", "read_mapping", "text_of"]

T = TypeVar("T", bound=BaseModel)


def text_of(path: Path, *, kind: str) -> str:
    """A small text file.

    Args:
        path: Where it is.
        kind: What it should be, in a word.

    Raises:
        LichenError: if it is large, no text, or cannot be read.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise LichenError(
                f"is larger than {LARGEST // 1024} KiB", where=str(path), fix=f"name a {kind}, which is a page of YAML"
            )
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LichenError("is not a text file", where=str(path), fix=f"name a {kind} in YAML, as UTF-8") from None
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from None


def read_mapping(text: str, *, where: str, kind: str, fix: str) -> Mapping[str, Any]:
    """The keys and values of a text in YAML.

    Args:
        text: What was written.
        where: The file it is of.
        kind: What it should be, in a word.
        fix: What helps somebody who has no keys in it.

    Raises:
        LichenError: if it is none.
    """
    value = load_yaml(text, where=where)
    if not isinstance(value, Mapping):
        what = "is empty" if value is None else f"is not a {kind}: it must hold keys with values"
        raise LichenError(what, where=where, fix=fix)
    return value


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """JSON's types only, so that one strict checker serves YAML and Python alike.

    Args:
        value: Whatever was written.
        where: The key it stands at.
        depth: How far down that is.

    Raises:
        LichenError: for anything that is no text, number, list or mapping.
    """
    if depth > 16:
        raise LichenError("is nested too deep", where=where, fix="recipes and policies are three deep at most")
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise LichenError("holds a character that is no text", where=where, fix="save it as UTF-8")
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise LichenError(f"must be a finite number, not {number}", where=where, fix="use an ordinary number")
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise LichenError(f"has the key {key!r}, which is not a name", where=where, fix="keys are plain words")
        return {key: plain(inner, f"{where}.{key}".removeprefix("recipe."), depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, f"{where}[{i}]", depth + 1) for i, inner in enumerate(value)]
    raise LichenError(
        f"holds a Python {type(value).__name__}", where=where, fix="use text, numbers, lists and mappings"
    )


def _wrap(section: type[BaseModel], values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Put single values into lists where the schema wants a list; returns where that was done."""
    done: list[tuple[str, ...]] = []
    for name, field in section.model_fields.items():
        value = values.get(name)
        if value is None:
            continue  # most keys are left out
        if isinstance(value, dict) and (inner := section_of(field.annotation)) is not None:
            done += _wrap(inner, value, (*path, name))
        arms = get_args(field.annotation) if get_origin(field.annotation) is not tuple else (field.annotation,)
        words = [word for arm in arms if get_origin(arm) is Literal for word in get_args(arm)]
        wants_list = any(get_origin(arm) is tuple for arm in arms)
        if wants_list and isinstance(value, (str, int, float)) and value not in words:
            values[name] = [value]
            done.append((*path, name))
    return done


def check(root: type[T], values: dict[str, Any]) -> T:
    """What a schema makes of some values.

    Args:
        root: The schema.
        values: Plain values by key; single ones are put into lists, in place.

    Raises:
        LichenError: for the first fault, with its dotted key.
    """
    wrapped = _wrap(root, values)
    try:
        return root.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise explain(error, root, wrapped) from None
