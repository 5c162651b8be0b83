"""Turns a failed validation into one sentence.

The schema's checker reports many faults in its own words. Here the first one is picked, its place is
written as the user wrote it, and the fix is made from the schema itself: its choices, its
descriptions, its defaults. So a new key needs no new words.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lichen.core.errors import LichenError
from lichen.recipes.schema.features.feature import FaultsError

__all__ = ["choices", "example", "expected", "explain", "field_of", "items_of", "section_of"]


def _arms(annotation: Any) -> list[Any]:
    """The alternatives of a type, without None and without Annotated."""
    if get_origin(annotation) is Annotated:
        return _arms(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in get_args(annotation) for arm in _arms(part)]
    return [] if annotation is type(None) else [annotation]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section a key opens, None for a plain value."""
    for arm in _arms(annotation):
        if isinstance(arm, type) and issubclass(arm, BaseModel):
            return arm
    return None


def items_of(annotation: Any) -> type[BaseModel] | None:
    """The section that each item of a list opens, None for any other key."""
    return next((section_of(get_args(arm)[0]) for arm in _arms(annotation) if get_origin(arm) is tuple), None)


def choices(annotation: Any) -> tuple[str, ...]:
    """The words a key may hold, also inside a list; empty where it is free.

    >>> choices(tuple[Literal["a", "b"], ...])
    ('a', 'b')
    """
    found: list[str] = []
    for arm in _arms(annotation):
        if get_origin(arm) is Literal:
            found += [str(word) for word in get_args(arm)]
        elif get_origin(arm) is tuple:
            found += choices(get_args(arm)[0])
    return tuple(found)


def expected(annotation: Any) -> str:
    """What a key holds, in plain words.

    >>> expected(tuple[float, ...] | Literal["all"])
    'a list of numbers or "all"'
    """
    words: list[str] = []
    for arm in _arms(annotation):
        if get_origin(arm) is Literal:
            words.append(" or ".join(f'"{word}"' for word in get_args(arm)))
        elif get_origin(arm) is tuple:
            inner = _arms(get_args(arm)[0])[0]
            other = "words" if items_of(arm) is None else "sections"
            words.append("a list of " + {int: "whole numbers", float: "numbers", str: "texts"}.get(inner, other))
        elif get_origin(arm) is dict:
            kind = get_args(arm)[1]
            each = {int: "a whole number", str: "a text"}.get(kind, "a list")
            words.append(f"keys with {expected(kind) if len(_arms(kind)) > 1 else each} each")
        elif section_of(arm) is not None:
            words.append("a section with keys")
        else:
            words.append({int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[arm])
    return " or ".join(words)


def example(field: FieldInfo) -> str:
    """A value that would be accepted, as YAML in one line."""
    from lichen.recipes.schema.yaml import dump_yaml

    value = field.get_default(call_default_factory=True) if not field.is_required() else None
    if field.examples:
        value = field.examples[0]
    if value is None or value in ((), {}) or isinstance(value, BaseModel):
        words, section = choices(field.annotation), section_of(field.annotation)
        item = items_of(field.annotation)
        if item is not None:
            name, inner = next(iter(item.model_fields.items()))
            return f"[{{{name}: {example(inner)}}}]"
        if words:
            value = [words[0]] if get_origin(_arms(field.annotation)[0]) is tuple else words[0]
        elif section is not None:
            name, inner = next(iter(section.model_fields.items()))
            return f"{{{name}: {example(inner)}}}"
        else:
            arm = _arms(field.annotation)[0]
            inner = _arms(get_args(arm)[0])[0] if get_origin(arm) is tuple else arm
            value = {int: 8, float: 0.5, bool: True}.get(inner, "some text")
            value = [value] if get_origin(arm) is tuple else value
            if get_origin(arm) is dict:
                return "{1: 3}" if get_args(arm)[1] is int else "{text: my_text_column}"
    text = dump_yaml(list(value) if isinstance(value, tuple) else value)
    return text.removesuffix("...\n").strip()


def _keys(field: FieldInfo) -> tuple[str, ...]:
    """The keys a free mapping may have; empty for any other field."""
    return next((choices(get_args(arm)[0]) for arm in _arms(field.annotation) if get_origin(arm) is dict), ())


def _is_mapping(field: FieldInfo) -> bool:
    """Whether the user names the keys below."""
    return any(get_origin(arm) is dict for arm in _arms(field.annotation))


def _homes(section: type[BaseModel], word: str, path: str = "") -> list[str]:
    """Every place of the schema with a key of this name."""
    found = [path + word] if word in section.model_fields else []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        found += _homes(inner, word, f"{path}{name}.") if inner is not None else []
    return found


def field_of(root: type[BaseModel], path: Sequence[str | int]) -> FieldInfo | None:
    """The schema's field at a path of names, None where there is none."""
    section: type[BaseModel] | None = root
    field: FieldInfo | None = None
    for step in path:
        if isinstance(step, int) or (field is not None and _is_mapping(field)):
            continue
        field = section.model_fields.get(step) if section is not None else None
        section = section_of(field.annotation) or items_of(field.annotation) if field is not None else None
    return field


def _place(root: type[BaseModel], loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """The user's path in the checker's one, which also names the arms of unions it tried."""
    trimmed: list[str | int] = []
    section: type[BaseModel] | None = root
    annotation: Any = root
    for step in loc:
        if isinstance(step, int) and items_of(annotation) is not None:
            trimmed.append(step)
        elif section is not None and isinstance(step, str):
            trimmed.append(step)
            field = section.model_fields.get(step)
            annotation = field.annotation if field is not None else None
            section = section_of(annotation) or items_of(annotation) if annotation is not None else None
        elif isinstance(step, int) or (step != "[key]" and any(get_origin(arm) is dict for arm in _arms(annotation))):
            trimmed.append(step)
            annotation = None  # below a key that the user named, texts name the arms of its union
    return tuple(trimmed)


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a section"
    text = repr(list(value) if isinstance(value, tuple) else value)
    text = text if len(text) <= 40 else text[:36] + " ..."
    return f"the text {text}" if isinstance(value, str) else text


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def _unknown(root: type[BaseModel], path: tuple[str | int, ...]) -> tuple[str, str]:
    outer = field_of(root, path[:-1])
    section = section_of(outer.annotation) or items_of(outer.annotation) if outer is not None else root
    known = list(section.model_fields) if section is not None else []
    word = str(path[-1])
    fix = _nearest(word, known) or f"the keys here are: {', '.join(known)}"
    if fix.endswith("? "):
        return "unknown key", fix.strip()
    homes = _homes(root, word)
    return "unknown key", f"did you mean {homes[0]!r}?" if homes else fix


def _bound(context: Mapping[str, Any]) -> str:
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    message = [f"must be {words} {context[sign]:g}" for sign, words in signs.items() if sign in context]
    return message[0] if message else "is out of range"


def _explain_one(root: type[BaseModel], error: Mapping[str, Any], path: tuple[str | int, ...]) -> tuple[str, str, str]:
    """``(where, what, fix)`` of one fault."""
    where, kind, value = _dotted(path) or "recipe", str(error["type"]), error.get("input")
    field, context = field_of(root, path), error.get("ctx", {})
    if kind == "value_error" and isinstance(context["error"], FaultsError):
        whole = context["error"].whole()
        return whole.where, whole.what, whole.fix
    if kind == "value_error":
        message = str(context["error"])
        named = re.match(r"([a-z_.]+): (.*)", message, re.S)
        if named:
            first = named[1].partition(".")[0]
            inside = path and path[-1] == first  # a section that stands at several places names its keys from itself on
            where, message = f"{where}{named[1].removeprefix(first)}" if inside else named[1], named[2]
        what, _, fix = message.partition("; ")
        return where, what, fix
    if kind == "extra_forbidden":
        return where, *_unknown(root, path)
    if field is None:
        return where, f"must be a section with keys, not {_shown(value)}", "start from a recipe of `lichen list`"
    listed = f"; the choices: {', '.join(choices(field.annotation))}" if choices(field.annotation) else ""
    sample = f"for example {next(str(s) for s in reversed(path) if isinstance(s, str))}: {example(field)}{listed}"
    if kind == "missing":
        return where, f"is missing: {field.description or expected(field.annotation)}", f"add it, {sample}"
    if kind == "literal_error" and error["loc"][-1] == "[key]":
        keys = _keys(field)
        return where, "unknown key", f"{_nearest(str(path[-1]), keys)}the keys here are: {', '.join(keys)}"
    if _keys(field) and len(path) > 2 and path[-1] in _keys(field):
        return where, f"must be a text, not {_shown(value)}", f"for example {path[-1]}: my_column"
    words = choices(field.annotation)
    if kind == "literal_error" and all(choices(arm) for arm in _arms(field.annotation)):
        near = _nearest(value, words) if isinstance(value, str) else ""
        return where, f"{_shown(value)} is not a choice here", f"{near}use one of: {', '.join(words)}"
    if kind.startswith(("greater_than", "less_than")):
        return where, f"{_bound(context)}, not {_shown(value)}", sample
    if kind == "too_short":
        return where, "must not be empty", sample
    if kind == "finite_number":
        return where, f"must be a finite number, not {_shown(value)}", sample
    fix = f"put it in quotes, or {sample}" if _arms(field.annotation) == [str] and isinstance(value, int) else sample
    return where, f"must be {expected(field.annotation)}, not {_shown(value)}", fix


def explain(error: ValidationError, root: type[BaseModel], wrapped: Sequence[tuple[str, ...]] = ()) -> LichenError:
    """The first fault of a validation as one sentence with place and fix.

    An unknown key goes first: it is often the reason why another one is missing.

    Args:
        error: What the schema's checker raised.
        root: The schema.
        wrapped: Places where a single value was taken for a list of one; their faults name no position.

    Returns:
        The error to raise; it says how many further places are at fault.
    """
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    paths = []
    for fault in faults:
        path = _place(root, fault["loc"])
        paths.append(path[:-1] if path[:-1] in set(wrapped) and isinstance(path[-1], int) else path)
    where, what, fix = _explain_one(root, faults[0], paths[0])
    more = len({tuple(step for step in path if isinstance(step, str)) for path in paths}) - 1
    if more:
        what += f" (and {more} more {'problem' if more == 1 else 'problems'})"
    return LichenError(what, where=where, fix=fix)
