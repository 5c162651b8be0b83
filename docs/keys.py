"""Write the guide's key tables from the schema of recipes: ``python docs/keys.py``.

The guide keeps its own words between the tables. Each table stands between two comments that name its
section, so that a new key of the schema needs no edit by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lichen.recipes.schema.explain import choices, expected, section_of
from lichen.recipes.schema.recipe import Recipe
from lichen.recipes.schema.yaml import dump_yaml

GUIDE = Path(__file__).with_name("guide.md")
_BLOCK = re.compile(r"<!-- keys: ([a-z_.]+) -->\n.*?<!-- end -->", re.S)


def sections(root: type[BaseModel] = Recipe, path: str = "") -> dict[str, type[BaseModel]]:
    """Every section of the schema by its dotted path; the recipe itself is ``recipe``."""
    found = {path or "recipe": root}
    for name, field in root.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            found |= sections(inner, f"{path}.{name}".removeprefix("."))
    return found


def _none(field: FieldInfo) -> bool:
    return field.get_default(call_default_factory=True) is None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == "":
        return "none"
    text = dump_yaml(list(value) if isinstance(value, tuple) else value).removesuffix("...\n").strip()
    return f"`{text}`"


def table(section: type[BaseModel], path: str) -> str:
    """A Markdown table of a section's own keys: what each holds, its default, what it means."""
    lines = ["| Key | Holds | Default | Meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key = name if path == "recipe" else f"{path}.{name}"
        words, inner = choices(field.annotation), section_of(field.annotation)
        meaning = field.description or ((inner.__doc__ or "").split("\n")[0] if inner is not None else "")
        if inner is not None:
            holds, default = "a section", "required" if field.is_required() else "none" if _none(field) else "its own"
        else:
            holds, default = expected(field.annotation), _default(field)
            listed = ", ".join(f"`{word}`" for word in words)
            if words and '"' in holds:
                holds = listed if holds.startswith('"') else holds.replace('"', "`")
            elif words:
                holds = f"{holds}: {listed}"
        lines.append(f"| `{key}` | {holds} | {default} | {meaning} |")
    return "\n".join(lines)


def fill(text: str) -> str:
    """The guide's text with every table made anew.

    Raises:
        KeyError: if a comment names a section that the schema does not have.
    """
    known = sections()
    return _BLOCK.sub(lambda m: f"<!-- keys: {m[1]} -->\n{table(known[m[1]], m[1])}\n<!-- end -->", text)


if __name__ == "__main__":
    GUIDE.write_text(fill(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
