"""Reads a strict YAML: the JSON-like core, with line numbers of faults.

YAML 1.1 reads ``1e-3`` as text, ``no`` as false, ``1:30`` as ninety and ``010`` as eight; it lets a
key stand twice and lets a few lines of aliases grow to gigabytes. Here numbers are numbers as in
YAML 1.2's core schema, dates and words stay text, and duplicate keys, aliases and tags are refused.

References:
    Ben-Kiki, Evans, döt Net, Müller, Antoniou, Aro, Smith. "YAML Ain't Markup Language, revision
    1.2.2", section 10.3 (core schema), 2021. https://yaml.org/spec/1.2.2/
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, final

import yaml

from lichen.core.errors import LichenError

__all__ = ["dump_yaml", "load_yaml"]

LARGEST = 256 * 1024
"""Bytes of YAML at most: far above any recipe, far below what takes seconds to parse."""
DEEPEST = 16

_RESOLVERS: list[tuple[str, str, list[str]]] = [
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
]

_PLAIN_WORDS = (
    ("mapping values are not allowed", "has a ':' where none fits, or a wrong indentation"),
    ("could not find expected ':'", "has a key without ':'"),
    ("expected <block end>", "is indented unlike the lines above it"),
    ("expected ',' or", "has a bracket that is not closed, or a comma too few"),
    ("while scanning a quoted scalar", "has a quote that is not closed"),
    ("unexpected end of stream", "has a quote or bracket that is not closed"),
    ("but found another document", "starts a second document; a recipe is one"),
    ("expected a single document", "starts a second document; a recipe is one"),
)


@final
class _RefusedError(Exception):
    """A fault with its place, on the way to becoming a LichenError."""

    def __init__(self, what: str, mark: yaml.Mark, fix: str) -> None:
        super().__init__(what)
        self.what, self.mark, self.fix = what, mark, fix


@final
class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's own name)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _RefusedError("uses an anchor (&) or alias (*)", event.start_mark, "write the value out, or quote it")
        if getattr(event, "tag", None):
            raise _RefusedError(f"uses the tag {event.tag}", event.start_mark, "remove it, or quote the value")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _RefusedError(
                f"is nested more than {DEEPEST} deep", event.start_mark, "recipes and policies are three deep at most"
            )
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def mapping(self, node: yaml.MappingNode) -> dict[Hashable, Any]:
        """A dict, refusing keys that are no names or stand twice."""
        result: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _RefusedError("has a key that is not a name", key_node.start_mark, "keys are plain words")
            if key_node.value in result:
                raise _RefusedError(f"has the key {key_node.value!r} twice", key_node.start_mark, "remove one of them")
            result[key_node.value] = self.construct_object(value_node, deep=True)
        return result

    def integer(self, node: yaml.ScalarNode) -> int:
        """Decimal only; the length bound keeps the conversion quick."""
        if len(node.value) > 100:
            raise _RefusedError("has a number of more than 100 digits", node.start_mark, "use a smaller number")
        return int(node.value)

    def real(self, node: yaml.ScalarNode) -> float:
        """Python's own reading, which knows 1e-3."""
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


@final
class _Dumper(yaml.SafeDumper):
    # Both sides must agree on what looks like a number, or text such as '1e-3' would come back as one.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in _RESOLVERS:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real)


def _plain_words(error: yaml.MarkedYAMLError, line: str) -> tuple[str, str]:
    problem = f"{error.context or ''} {error.problem or ''}"
    if "\t" in line[: len(line) - len(line.lstrip())] or r"'\t'" in problem:
        return "is indented with a tab", "use spaces"
    for theirs, ours in _PLAIN_WORDS:
        if theirs in problem:
            return ours, "mend this line or the one before it"
    return "is not valid YAML here", "mend this line or the one before it; quote text with any of : # { } [ ] & * !"


def load_yaml(text: str, *, where: str) -> Any:
    """Read one YAML document.

    Args:
        text: The document.
        where: File or option it came from; line and column are put behind it.

    Returns:
        Nested dicts, lists and scalars; None for an empty document.

    Raises:
        LichenError: for anything outside the core described above, with line and column.

    >>> load_yaml("lr: [1e-3, 2]\\nname: no", where="here")
    {'lr': [0.001, 2], 'name': 'no'}
    """
    if len(text) > LARGEST:
        raise LichenError(f"is larger than {LARGEST // 1024} KiB", where=where, fix="a page of YAML is enough")
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except _RefusedError as error:
        what, mark, fix = error.what, error.mark, error.fix
    except yaml.MarkedYAMLError as error:
        found = error.problem_mark or error.context_mark
        if found is None:
            raise LichenError("is not valid YAML", where=where, fix="see docs for an example recipe") from None
        lines = text.splitlines()
        what, fix = _plain_words(error, lines[found.line] if found.line < len(lines) else "")
        mark = found
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise LichenError(
            "holds a character that is no text", where=f"{where}, line {line}", fix="save the file as plain UTF-8 text"
        ) from None
    raise LichenError(what, where=f"{where}, line {mark.line + 1}, column {mark.column + 1}", fix=fix) from None


def dump_yaml(value: Any) -> str:
    """Write nested dicts, lists and scalars so that :func:`load_yaml` gives them back equal.

    >>> print(dump_yaml({"name": "1e-3", "lr": [0.001]}), end="")
    name: '1e-3'
    lr: [0.001]
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
