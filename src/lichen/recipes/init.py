"""A first recipe for the user's own data: look at its rows, guess, and say what was taken for what.

Rows are read as a run reads them, the first ten thousand of a large file. Guesses go by what columns are called and
by what they hold; each is written as a plain key that the user can change, and told with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.visible import clipped, listed
from lichen.data.files import data_files, owners_of_files, read_notes, rows_of
from lichen.data.record import Record
from lichen.data.records import records_of
from lichen.recipes.init_facts import Column, columns_of
from lichen.recipes.init_names import Ask, Roles, Wishes
from lichen.recipes.init_shapes import roles_of
from lichen.recipes.init_write import full_recipe, short_recipe

__all__ = ["Guess", "guess", "init_recipe"]

HEAD_ROWS = 10_000
HEAD_LETTERS = 1 << 25
HEAD_FILES = 64
MOST_CLIENTS = 32
FEWEST_ROWS = 10

_WIDTHS = (32, 64, 128, 256, 512)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What was found in the data.

    Attributes:
        values: The recipe, as a mapping.
        told: Lines for the screen: what was taken for what, and what was left out.
        notes: Sentences that stand above the recipe.
    """

    values: Mapping[str, Any]
    told: Sequence[str]
    notes: Sequence[str]

    def recipe(self, *, full: bool = False) -> str:
        """YAML that :func:`lichen.recipes.read.read_recipe` accepts: what matters, or every key with its meaning."""
        return full_recipe(self.values, list(self.notes)) if full else short_recipe(self.values, list(self.notes))


def init_recipe(data: Path, *, wishes: Wishes | None = None, full: bool = False) -> str:
    """Look at the user's data and write a recipe for it.

    Args:
        data: A CSV, JSONL, JSON or Parquet file, or a folder of such files.
        wishes: What the user said about columns, task and model.
        full: Write every key with its meaning.

    Returns:
        YAML that :func:`lichen.recipes.read.read_recipe` accepts.

    Raises:
        LichenError: if there is no such file, it cannot be read, or holds no text.
    """
    return guess(data, wishes).recipe(full=full)


def guess(data: Path, wishes: Wishes | None = None, *, ask: Ask | None = None) -> Guess:
    """What the data are taken for.

    Args:
        data: A CSV, JSONL, JSON or Parquet file, or a folder of such files.
        wishes: What the user said about columns, task and model.
        ask: Asks a person where several answers are as good; None where there is nobody.

    Raises:
        LichenError: if there is no such file, it cannot be read, holds no text, or a wish does not fit it.
    """
    data, wishes = Path(data), wishes or Wishes()
    if not data.expanduser().exists():
        raise LichenError("no such file or folder", where=str(data), fix="check the path")
    path = data.expanduser()
    files = data_files(path)
    owners = owners_of_files(path, files)
    by_file = len(set(owners.values())) > 1
    heads = _heads(files)
    rows = [row for _, of in heads for row in of]
    if not rows:
        raise LichenError("has no rows", where=str(files[0]), fix="give data with at least a few rows below the names")
    columns = columns_of(rows)
    roles = roles_of(columns, wishes, where=str(data), by_file=by_file and wishes.client is None, ask=ask)
    client = {file: owners[file] for file, _ in heads} if wishes.client is None else {}
    records = [
        record
        for file, of in heads
        for record in records_of(of, roles.columns, client=client.get(file, ""), where=str(file))
    ]
    texts = [record for record in records if record.text or record.messages]
    if not texts:
        raise LichenError("has no row with text", where=str(data), fix="name another column by --text")
    values, notes = _values(data, roles, wishes, texts, by_file)
    told = _told(data, roles, columns, records, texts, values, files, owners, by_file)
    return Guess(values=values, told=[*told, *notes], notes=[f"Written by lichen init. {notes[0]}", *_MORE])


_MORE = ("Every key with its meaning: lichen init DATA --full, and docs/guide.md.",)


def _heads(files: Sequence[Path]) -> list[tuple[Path, list[Mapping[str, Any]]]]:
    """The first rows of the first files, as many of each."""
    some = files[:HEAD_FILES]
    each = max(HEAD_ROWS // len(some), 200)
    found = []
    for file in some:
        rows, letters = [], 0
        for row in islice(rows_of(file), each):
            rows.append(row)
            letters += sum(len(cell) for cell in row.values() if isinstance(cell, str))
            if letters > HEAD_LETTERS // len(some):
                break
        found.append((file, rows))
    return found


def _tokens(record: Record) -> int:
    """About how many tokens a row takes, with the template around it: four letters a token, fewer beyond ASCII."""
    turns = [str(turn.get("content") or "") for turn in record.messages] or [record.prompt, record.text]
    text = "".join(turns)
    plain = sum(map(str.isascii, text)) if not text.isascii() else len(text)
    return plain // 4 + (len(text.encode("utf-8", "replace")) - plain) // 2 + 8 * len(turns) + 8


def _values(
    data: Path, roles: Roles, wishes: Wishes, texts: Sequence[Record], by_file: bool
) -> tuple[dict[str, Any], list[str]]:
    """The recipe as a mapping, and sentences on what was assumed."""
    chat, notes = roles.task == "chat", []
    lengths = sorted(_tokens(record) for record in texts)
    most = lengths[int(0.95 * (len(lengths) - 1))]
    widths = (*_WIDTHS, 1024) if chat else _WIDTHS
    width = next((w for w in widths if w >= most), widths[-1])
    section: dict[str, Any] = {"name": str(data), "columns": roles.columns, "max_length": width}
    model: dict[str, Any] = {"name": wishes.model or ("smollm2-135m" if chat else "minilm-l6")}
    if wishes.model is not None and roles.task != "oneshot":
        model["adapter"] = {"targets": "all-linear"}
    elif roles.task == "classify":
        model["adapter"] = {"targets": ["query", "value"], "modules_to_save": ["classifier"]}
    if chat:
        form = "messages" if "messages" in roles.columns else "chat" if "prompt" in roles.columns else "plain"
        section["form"] = form
    if by_file and "client" not in roles.columns:
        section["partition"] = {"by": "client"}
        notes.append("Each file, or each folder of files, is a client.")
    elif "client" in roles.columns:
        section["partition"] = {"by": "client"}
        notes.append(f"Column {roles.columns['client']!r} tells the clients apart.")
    else:
        few = {"clients": max(len(texts) // FEWEST_ROWS, 2)} if len(texts) < 10 * FEWEST_ROWS else {}
        section["partition"] = {"by": "iid", **few}
        notes.append("No column tells clients apart, so rows are dealt out at random (data.partition).")
    if section["partition"]["by"] == "client":
        section |= _sizes(roles, texts, notes)
    if "group" not in roles.columns:
        section["split_by"] = "row"
    cut = sum(tokens > width for tokens in lengths)
    if cut:
        notes.append(f"About {_share(cut, len(lengths))} of the rows are longer than {width} tokens and will be cut.")
    values = {
        "name": clipped(data.stem, 60) or "recipe",
        "task": roles.task,
        "model": model,
        "data": section,
        "optimizer": {"lr": [0.001]},
        "federation": {"rounds": 10, "steps": 4, "batch": 4},
        "compare": {"columns": ["base", "alone", "pooled"]},
    }
    if roles.task == "oneshot":
        del values["optimizer"], values["federation"], values["compare"]
    return values, notes


def _sizes(roles: Roles, texts: Sequence[Record], notes: list[str]) -> dict[str, Any]:
    """Keys that keep clients out who could not take part, where there are such."""
    rows: dict[str, list[Record]] = {}
    for record in texts:
        rows.setdefault(record.client, []).append(record)
    enough = {name: of for name, of in rows.items() if len(of) >= FEWEST_ROWS}
    found: dict[str, Any] = {}
    if 2 <= len(enough) < len(rows):
        found |= {"min_rows": FEWEST_ROWS, "unsplit": "drop"}
        few = len(rows) - len(enough)
        notes.append(f"{few:,} of {len(rows):,} clients have fewer than {FEWEST_ROWS} rows and stay out.")
    else:
        enough = rows
    if len(enough) > MOST_CLIENTS:
        found["max_clients"] = MOST_CLIENTS
        notes.append(f"{MOST_CLIENTS} of {len(enough):,} clients are drawn, so that a first run is short.")
    alone = sum(len({str(record.label) for record in of}) == 1 for of in enough.values())
    if roles.task == "classify" and alone:
        found["one_class"] = "drop"
        notes.append(f"{alone:,} of {len(enough):,} clients have rows of one class only and stay out.")
    return found


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    return "less than 1 %" if share < 1 else f"{share:.0f} %"


def _told(
    data: Path,
    roles: Roles,
    columns: Sequence[Column],
    records: Sequence[Record],
    texts: Sequence[Record],
    values: Mapping[str, Any],
    files: Sequence[Path],
    owners: Mapping[Path, str],
    by_file: bool,
) -> list[str]:
    """What the screen shows: what was taken for what, and what was left out and why."""
    count = {column.name: len(column.counts) for column in columns}
    what = f"{len(files)} files" if data.is_dir() else "one file"
    told = [f"{data}: {what}, {len(records):,} rows looked at, {len(columns)} columns", *read_notes(data.expanduser())]
    told.append(f"taken for: {roles.shape}; task {roles.task}")
    for role, some in roles.columns.items():
        names = (some,) if isinstance(some, str) else some
        number = f"  ({count[names[0]]:,} different)" if role in ("client", "label", "group") else ""
        told.append(f"  {role:<10} {' + '.join(clipped(name, 60) for name in names)}{number}")
    if by_file and "client" not in roles.columns:
        told.append(f"  {'client':<10} {listed(sorted(set(owners.values())), most=6)}")
    for name, why in roles.left.items():
        told.append(f"  left out   {clipped(name, 60)}: {why}")
    if len(texts) < len(records):
        told.append(f"  {len(records) - len(texts):,} rows without text will be dropped")
    told.append(f"  length     {values['data']['max_length']} tokens a row (data.max_length, guessed from letters)")
    return told
