"""Writes a first recipe as YAML: what matters, or every key with its meaning.

Examples behind a ``#`` are keys that could be set. Each one is tried before it is written: taking its ``#`` away
gives a recipe that reads.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lichen.core.errors import LichenError
from lichen.core.visible import visible
from lichen.recipes.schema.explain import choices, example, section_of
from lichen.recipes.schema.read import read_recipe
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.yaml import dump_yaml, load_yaml

__all__ = ["every_key", "full_recipe", "short_recipe"]

Values = Mapping[str, Any]
Reads = Callable[[tuple[str, ...], str], bool]

_COMMENTS: dict[str, str] = {
    "model.name": "catalog name, local folder or hub id",
    "model.head": "begins in closed form, from the clients' statistics; random: drawn by the seed",
    "data.max_length": "tokens a row at most",
    "data.max_rows": "rows a client at most",
    "data.min_rows": "clients with fewer rows stay out",
    "data.max_clients": "drawn by the seed",
    "data.classes": "rows of other labels, or of none, stay out",
    "data.test_rows": "rows a client at most to choose by, and as many to test; raise it for sharper numbers",
    "data.on_too_few_rows": "clients with too few rows for every part, and rows of no client, stay out",
    "data.on_single_class": "clients whose rows all have one label",
    "optimizer.lr": "several are a grid, chosen on validation rows",
    "federation.rounds": "rounds in all",
    "federation.local_steps": "of a client in a round",
    "federation.batch_size": "rows a step",
    "compare.baselines": "what it is held against",
    "compare.alone_epochs": "passes over its rows of a client of alone_best at most",
}
"""What is said beside keys of the short recipe; a short form of the schema's own words."""

_OFFERED: tuple[tuple[str, str], ...] = (
    ("seed", "1"),
    ("data.max_rows", "200"),
    ("federation.clients_per_round", "8"),
    ("engine.clients_per_block", "4"),
)
"""Keys that are shown behind a ``#``: what people change first."""


def _inline(value: Any) -> str:
    """A scalar, a list or a small mapping on one line."""
    if isinstance(value, str) and (len(value) > 80 or "\n" in value):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_inline(inner)}" for key, inner in value.items()) + "}"
    text = dump_yaml(list(value) if isinstance(value, tuple) else value).removesuffix("...\n")
    return " ".join(line.strip() for line in text.splitlines())


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(visible(text), 110 - len(indent))]


def _reads(values: Values, path: tuple[str, ...], text: str) -> bool:
    """Whether the recipe with one more key, written like this, is a recipe."""
    changed: dict[str, Any] = json.loads(json.dumps(values))
    mapping = changed
    for step in path[:-1]:
        mapping = mapping.setdefault(step, {})
    try:
        mapping[path[-1]] = load_yaml(text, where="example")
        read_recipe(changed)
    except LichenError:
        return False
    return True


def short_recipe(values: Values, notes: list[str]) -> str:
    """The keys that were guessed or matter most, with a word on each; at most forty lines.

    Args:
        values: The recipe as a mapping.
        notes: Sentences to stand above it.
    """
    lines = [line for note in notes for line in _comment(note)]
    for name, value in values.items():
        if not isinstance(value, Mapping):
            lines.append(f"{name}: {_inline(value)}")
            lines += _offered(values, name)
            continue
        lines.append(f"{name}:")
        for key, inner in value.items():
            if key == "columns" and isinstance(inner, Mapping):
                lines += ["  columns:", *(f"    {role}: {_inline(column)}" for role, column in inner.items())]
                continue
            comment = _COMMENTS.get(f"{name}.{key}")
            lines.append(f"  {key}: {_inline(inner)}{f'  # {comment}' if comment else ''}")
        lines += _offered(values, name)
    return "\n".join(lines) + "\n"


def _offered(values: Values, section: str) -> list[str]:
    """Keys of a section that could be set, behind a ``#``."""
    found: list[str] = []
    for dotted, text in _OFFERED:
        path = tuple(dotted.split("."))
        *outer, last = path
        mapping = values.get(outer[0], {}) if outer else values
        after = outer[0] if outer else "task"
        if after == section and last not in mapping and _reads(values, path, text):
            words = Recipe.model_fields[path[0]]
            inner = section_of(words.annotation)
            about = inner.model_fields[last] if outer and inner is not None else words
            found.append(f"{'  ' * len(outer)}# {last}: {text}  # {about.description}")
    return found


def full_recipe(values: Values, notes: list[str]) -> str:
    """Every key with its meaning and its choices.

    Args:
        values: The recipe as a mapping.
        notes: Sentences to stand above it.
    """
    head = ["Guessed from the rows of the data; every key can be changed, keys left out take their default.", *notes]
    lines = [line for note in head for line in _comment(note)]
    return "\n".join([*lines, "", *every_key(Recipe, values, partial(_reads, values))]).rstrip() + "\n"


def _entry(name: str, field: FieldInfo, given: Any, reads: Reads, path: tuple[str, ...]) -> list[str]:
    """One key with its description and choices above it."""
    indent = "  " * len(path)
    words = choices(field.annotation)
    lines = _comment((field.description or name) + (f" (one of: {', '.join(words)})" if words else ""), indent)
    section = section_of(field.annotation)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if section is not None and (given is not None or default is not None or field.is_required()):
        return [*lines, f"{indent}{name}:", *every_key(section, given or {}, reads, (*path, name))]
    value = given if given is not None else default
    if value is None:
        text = example(field)
        # A key that cannot stand beside the others is told without an example.
        fits = reads((*path, name), text)
        return [
            *lines,
            f"{indent}# {name}: {text}" if fits else f"{indent}# ({name}: not with the keys of this recipe)",
        ]
    if isinstance(value, Mapping) and value:
        return [*lines, f"{indent}{name}:", *(f"{indent}  {key}: {_inline(inner)}" for key, inner in value.items())]
    return [*lines, f"{indent}{name}: {_inline(value)}"]


def every_key(section: type[BaseModel], given: Values, reads: Reads, path: tuple[str, ...] = ()) -> list[str]:
    """Lines of YAML with every key of a section, its meaning and its choices.

    Args:
        section: The schema.
        given: Its values; others have their default.
        reads: Whether a key with no default may be shown with an example, by its path and the example.
        path: Where the section stands.
    """
    lines: list[str] = []
    for name, field in section.model_fields.items():
        lines += _entry(name, field, given.get(name), reads, path)
        if not path:
            lines.append("")
    return lines
