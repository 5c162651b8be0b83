"""A first recipe for the user's own data: look at the head of it, guess, and say what each key means.

Only the head of a file is read, so that a large one costs nothing. Guesses go by the columns' names
first and by what they hold second; each guess is written as a plain key that the user can change.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lichen.core.errors import LichenError
from lichen.recipes.explain import choices, example, section_of
from lichen.recipes.schema import Recipe
from lichen.recipes.strict_yaml import dump_yaml

__all__ = ["init_recipe"]

Row = Mapping[str, Any]

KINDS = (".jsonl", ".json", ".csv", ".parquet")
HEAD_ROWS = 200
HEAD_BYTES = 1 << 20
MOST_CLASSES = 30

_NAMES: dict[str, tuple[str, ...]] = {
    "client": (
        *("client", "client_id", "user", "user_id", "username", "sender", "speaker", "author", "owner", "customer"),
        *("hospital", "site", "device", "institution", "person", "annotator", "reviewer", "subject"),
    ),
    "messages": ("messages", "conversation", "conversations", "chat", "dialogue"),
    "prompt": ("prompt", "instruction", "question", "query", "input", "context", "source"),
    "completion": ("completion", "response", "answer", "output", "reply", "target_text", "target"),
    "label": ("label", "labels", "class", "category", "sentiment", "rating", "stars", "score", "intent", "y", "target"),
    "text": ("text", "body", "content", "sentence", "utterance", "review", "comment", "message", "document", "tweet"),
    "group": ("group", "group_id", "conversation_id", "thread", "thread_id", "session", "session_id", "document_id"),
}


def _files(data: Path) -> list[Path]:
    if not data.exists():
        raise LichenError("no such file or folder", where=str(data), fix="check the path")
    if data.is_file():
        if data.suffix.lower() not in KINDS:
            raise LichenError(
                f"has the ending {data.suffix or '(none)'}", where=str(data), fix=f"give one of: {', '.join(KINDS)}"
            )
        return [data]
    found = sorted(file for file in data.iterdir() if file.suffix.lower() in KINDS and not file.name.startswith("."))
    if not found:
        raise LichenError(
            "holds no data files", where=str(data), fix=f"put files here, one a client: {', '.join(KINDS)}"
        )
    return found


def _json_rows(path: Path, text: str, whole: bool) -> list[Any]:
    if path.suffix.lower() == ".json":
        if not whole:
            raise LichenError(
                f"is one JSON value of more than {HEAD_BYTES >> 20} MiB",
                where=str(path),
                fix="write JSONL, a row a line",
            )
        value = json.loads(text)
        return value[:HEAD_ROWS] if isinstance(value, list) else [value]
    rows = []
    for number, line in enumerate(text.splitlines()[:HEAD_ROWS], start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError:
                raise LichenError(
                    "is not JSON", where=f"{path}, line {number}", fix="write one object a line"
                ) from None
    return rows


def _head(path: Path) -> list[Row]:
    """The first rows of a file."""
    try:
        if path.suffix.lower() == ".parquet":
            return _parquet_rows(path)
        with open(path, "rb") as file:
            data = file.read(HEAD_BYTES + 1)
        whole = len(data) <= HEAD_BYTES
        # A cut through the last line, or inside a character, leaves with that line.
        text = (data if whole else data[: data.rfind(b"\n") + 1]).decode("utf-8-sig")
        if not text and data:
            raise LichenError(
                f"has a line of more than {HEAD_BYTES >> 20} MiB", where=str(path), fix="shorten the rows"
            )
        if path.suffix.lower() == ".csv":
            rows: list[Any] = list(islice(csv.DictReader(io.StringIO(text, newline="")), HEAD_ROWS))
        else:
            rows = _json_rows(path, text, whole)
    except UnicodeDecodeError:
        raise LichenError("is not UTF-8 text", where=str(path), fix="save it as UTF-8") from None
    except OSError as error:
        raise LichenError(f"cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from None
    except (ValueError, csv.Error) as error:
        raise LichenError(f"cannot be read: {error}", where=str(path), fix="mend the file") from None
    if not all(isinstance(row, dict) for row in rows):
        raise LichenError("has a row that is no object", where=str(path), fix='write rows like {"text": "..."}')
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            batch = next(file.iter_batches(batch_size=HEAD_ROWS), None)
            rows: list[Row] = batch.to_pylist() if batch is not None else []
            return rows
    except pyarrow.ArrowException:
        raise LichenError("is not a Parquet file", where=str(path), fix="write it again as Parquet") from None


def _holds_text(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _holds_messages(values: Sequence[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
        for value in values
    )


def _holds_classes(values: Sequence[Any], rows: int) -> bool:
    distinct = {str(value) for value in values}
    short = all(isinstance(value, (str, int)) and len(str(value)) <= 40 for value in values)
    return short and 2 <= len(distinct) <= MOST_CLASSES and len(distinct) < rows


def _columns(rows: Sequence[Row], by_file: bool) -> dict[str, str]:
    """Which column plays which role."""
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    fits: dict[str, Callable[[list[Any]], bool]] = {
        "client": lambda v: not by_file and bool(v) and all(isinstance(x, (str, int)) for x in v),
        "messages": _holds_messages,
        "prompt": _holds_text,
        "completion": _holds_text,
        "label": lambda v: _holds_classes(v, len(rows)),
        "text": _holds_text,
        "group": lambda v: bool(v) and all(isinstance(x, (str, int)) for x in v),
    }
    found: dict[str, str] = {}
    for role in ("client", "group", "messages", "prompt", "completion", "label", "text"):
        for known in _NAMES[role]:
            match = next((n for n in names if n.lower().replace(" ", "_").replace("-", "_") == known), None)
            if match is not None and match not in found.values() and fits[role](values[match]):
                found[role] = match
                break
    if "completion" in found and "prompt" not in found and "text" not in found:
        found["text"] = found.pop("completion")
    if not {"text", "messages"} & found.keys() and not {"prompt", "completion"} <= found.keys():
        found.pop("prompt", None)
        free = [name for name in names if name not in found.values() and _holds_text(values[name])]
        if free:
            found["text"] = max(free, key=lambda name: sum(map(len, values[name])) / len(values[name]))
    return found


def _guess(data: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys that depend on the data, and notes for the user."""
    files = _files(data)
    rows = [row for file in files[:8] for row in _head(file)]
    by_file, notes = data.is_dir(), []
    if not rows:
        raise LichenError("has no rows", where=str(files[0]), fix="give data with at least a few rows")
    columns = _columns(rows, by_file)
    chat = "messages" in columns or {"prompt", "completion"} <= columns.keys()
    if not chat and "text" not in columns:
        names = ", ".join(dict.fromkeys(str(name) for row in rows for name in row)) or "none"
        raise LichenError(
            "has no column with text", where=str(files[0]), fix=f"name one 'text'; the columns are: {names[:300]}"
        )
    task = "classify" if "label" in columns and not chat else "chat"
    keep = {"client", "group"} | ({"text", "label"} if task == "classify" else set())
    if task == "chat":
        keep |= {"messages"} if "messages" in columns else {"prompt", "completion"} if chat else {"text", "prompt"}
    columns = {role: name for role, name in columns.items() if role in keep}
    said = next(columns[role] for role in ("messages", "completion", "text") if role in columns)
    lengths = sorted(len(str(row.get(said) or "")) for row in rows)
    # About four letters a token in English; room for 95 rows of 100 beside a prompt of the same length.
    tokens = lengths[int(0.95 * (len(lengths) - 1))] // 4 * (2 if task == "chat" else 1)
    width = next((w for w in (32, 64, 128, 256) if w >= tokens), 512)
    values: dict[str, Any] = {
        "name": data.stem or "recipe",
        "task": task,
        "data": {"name": str(data), "columns": columns, "max_length": width},
        "model": {"name": "minilm-l6" if task == "classify" else "smollm2-135m"},
    }
    if task == "classify":
        values["model"]["adapter"] = {"targets": ["query", "value"], "modules_to_save": ["classifier"]}
    else:
        values["data"]["form"] = "messages" if "messages" in columns else "chat"
    if by_file:
        notes.append(f"{len(files)} files, one a client.")
    elif "client" in columns:
        seen = len({str(row.get(columns["client"])) for row in rows})
        notes.append(f"column {columns['client']!r} tells the clients apart; {seen} in the first {len(rows)} rows.")
    else:
        values["data"]["partition"] = {"by": "iid"}
        notes.append(
            "no column tells clients apart, so rows are dealt out at random; set data.columns.client if one does."
        )
    if "group" not in columns:
        values["data"]["split_by"] = "row"
    return values, notes


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, 110 - len(indent))]


def _inline(value: Any) -> str:
    """A scalar or a list on one line."""
    if isinstance(value, str) and (len(value) > 80 or "\n" in value):
        return json.dumps(value, ensure_ascii=False)
    text = dump_yaml(list(value) if isinstance(value, tuple) else value).removesuffix("...\n")
    return " ".join(line.strip() for line in text.splitlines())


def _entry(name: str, field: FieldInfo, given: Any, depth: int) -> list[str]:
    """One key with its description and choices above it."""
    indent = "  " * depth
    words = choices(field.annotation)
    lines = _comment((field.description or name) + (f" (one of: {', '.join(words)})" if words else ""), indent)
    section = section_of(field.annotation)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if section is not None:
        if given is None and default is None and not field.is_required():
            return [*lines, f"{indent}# {name}: {example(field)}"]
        return [*lines, f"{indent}{name}:", *_section(section, given or {}, depth + 1)]
    value = given if given is not None else default
    if value is None:
        return [*lines, f"{indent}# {name}: {example(field)}"]
    if isinstance(value, Mapping) and value:
        return [*lines, f"{indent}{name}:", *(f"{indent}  {key}: {_inline(inner)}" for key, inner in value.items())]
    return [*lines, f"{indent}{name}: {_inline(value)}"]


def _section(section: type[BaseModel], given: Mapping[str, Any], depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        lines += _entry(name, field, given.get(name), depth)
        if depth == 0:
            lines.append("")
    return lines


def init_recipe(data: Path) -> str:
    """Look at the user's data and write a commented recipe for it.

    Args:
        data: A JSONL, CSV or Parquet file, or a folder with one such file a client.

    Returns:
        YAML that :func:`lichen.recipes.read.read_recipe` accepts.

    Raises:
        LichenError: if there is no such file, it cannot be read, or holds no text.
    """
    values, notes = _guess(Path(data))
    head = [
        "# Guessed from the first rows of the data; every key can be changed, keys left out take their default.",
        *(line for note in notes for line in _comment(note[0].upper() + note[1:], "")),
        "",
    ]
    return "\n".join([*head, *_section(Recipe, values, 0)]).rstrip() + "\n"
