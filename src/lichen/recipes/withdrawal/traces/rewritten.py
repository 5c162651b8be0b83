"""Files of a run without a client, from which the client's name and the numbers under it are taken out.

The others keep their numbers: the place in the roster stays, under another name and with no rows.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.present.cells import read_cell, text_cell
from lichen.present.charts.charts import clients_png, curves_png
from lichen.present.charts.contributions import contributions_png
from lichen.present.clients import read_clients
from lichen.present.summary import read_summary
from lichen.recipes.artifacts.contributions import CONTRIBUTIONS, read_contributions
from lichen.recipes.schema.read import recipe_of, recipe_sha256
from lichen.recipes.schema.yaml import dump_yaml, load_yaml
from lichen.recipes.withdrawal.report import FORGOTTEN, REPORT
from lichen.recipes.withdrawal.traces.naming import Name

__all__ = ["Withdrawn", "finish_written", "rewritten", "without_number"]

_UNDER = {
    "cards.json": ("cards", "cards_left"),
    "summary.json": ("cards", "cards_left", "read", "attack"),
    "config.json": ("clients", "files"),
}
"""Of which entries of a file a client's name is one, where other entries are words that could be equal to it."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """A client that goes.

    Attributes:
        name: Its name among the others'.
        number: Its place in the roster.
        instead: What it is called from now on.
    """

    name: Name
    number: int
    instead: str


def without_number(line: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A line of a trace or record without a client.

    >>> without_number({"asked": [0, 1], "counted": [[0, 0, 8.0, "d"], [1, 0, 8.0, "e"]], "missing": [1]}, 1)
    {'asked': [0], 'counted': [[0, 0, 8.0, 'd']], 'missing': []}
    >>> without_number({"named": [[1, "absent"], [2, "late"]], "refused": {"absent": 1, "late": 1}}, 1)
    {'named': [[2, 'late']], 'refused': {'late': 1}}
    """
    found = dict(line)
    for key in ("asked", "clients", "missing", "absent"):
        if isinstance(found.get(key), list):
            found[key] = [one for one in found[key] if one != number]
    if isinstance(found.get("named"), list) and isinstance(found.get("refused"), Mapping):
        mine = [_reason_of(one) for one in found["named"] if _number_of(one) == number]
        counts = {reason: count - mine.count(reason) for reason, count in found["refused"].items()}
        found["refused"] = {reason: count for reason, count in counts.items() if count > 0}
    for key in ("counted", "named", "paid"):
        if isinstance(found.get(key), list):
            found[key] = [one for one in found[key] if _number_of(one) != number]
    if isinstance(found.get("causes"), Mapping):
        causes = {cause: [one for one in some if one != number] for cause, some in found["causes"].items()}
        found["causes"] = {cause: some for cause, some in causes.items() if some}
    if isinstance(found.get("value"), Mapping):
        values = [one for one in found["value"].get("value", ()) if _number_of(one) != number]
        found["value"] = {**found["value"], "value": values}
    if isinstance(found.get("attendance"), Mapping):
        attendance = without_number(found["attendance"], number)
        attendance["invited"] = max(0, int(attendance["invited"]) - (number in line.get("clients", ())))
        found["attendance"] = attendance
    return found


def _number_of(one: Any) -> Any:
    return one.get("client") if isinstance(one, Mapping) else one[0]


def _reason_of(one: Any) -> Any:
    return one.get("reason") if isinstance(one, Mapping) else one[1]


def rewritten(name: str, data: bytes, going: Withdrawn) -> bytes | None:
    """A file's bytes without the client; None where it is made later, from others (:func:`finish_written`).

    Args:
        name: The file's path within the folder; its kind is written by a writer of its own, or JSON with names.
        data: Its bytes.
        going: Who goes.

    Raises:
        LichenError: if it cannot be read.
    """
    file = name.rpartition("/")[2]
    try:
        writer = _WRITERS.get(file)
        if writer is not None:
            return writer(data, going)
        if file.endswith(".json") and name != CONTRIBUTIONS:
            return _dump(_under(json.loads(data), _UNDER.get(file), going))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise LichenError("is damaged", where=name, fix="put it back from a copy") from None
    return None


def _how_made(data: bytes, going: Withdrawn) -> bytes:
    """How the run without the client was made; where the folders lay then is left out."""
    found = {key: one for key, one in json.loads(data).items() if key not in ("old", "new", "against")}
    return _dump(going.name.scrubbed(found, going.instead))


def _under(value: Any, keys: tuple[str, ...] | None, going: Withdrawn) -> Any:
    if keys is None:
        return going.name.scrubbed(value, going.instead)
    return {key: going.name.scrubbed(one, going.instead) if key in keys else one for key, one in value.items()}


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _recipe(data: bytes, going: Withdrawn) -> bytes:
    """With another name where a key takes clients or their files; the model's path stays as it is."""
    values = load_yaml(data.decode("utf-8"), where="recipe.yaml")
    fed = values.get("federation") or {}
    if isinstance(fed.get("absent"), list):
        fed["absent"] = [going.instead if one == going.name.name else one for one in fed["absent"]]
    for section in ("fingerprint", "attack"):
        if values.get(section) is not None:
            values[section] = going.name.scrubbed(values[section], going.instead)
    if isinstance(values.get("data"), dict):
        values["data"]["name"] = going.name.replaced(str(values["data"]["name"]), going.instead)
    return dump_yaml(values).encode()


def _roster(data: bytes, going: Withdrawn) -> bytes:
    plain = json.loads(data)
    plain["members"][going.number] = {"name": going.instead, "rows": {}}
    return _dump(plain)


def _trace(data: bytes, going: Withdrawn) -> bytes:
    lines = (without_number(json.loads(line), going.number) for line in data.splitlines())
    return b"".join(json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n" for line in lines)


def _table(data: bytes, going: Withdrawn) -> bytes:
    """``clients.csv``: the line stays, so that the others keep their number; it has no rows and no score."""
    heads, *rows = csv.reader(io.StringIO(data.decode("utf-8"), newline=""))
    column = heads.index("client")
    for at, row in enumerate(rows):
        if read_cell(row[column]) == going.name.name:
            zero = {"train", "valid", "test"}
            rows[at] = ["0" if head in zero and cell else "" for head, cell in zip(heads, row, strict=True)]
            rows[at][column] = text_cell(going.instead)
    return _csv([heads, *rows])


def _payout(data: bytes, going: Withdrawn) -> bytes:
    heads, *rows = csv.reader(io.StringIO(data.decode("utf-8"), newline=""))
    return _csv([heads, *(row for row in rows if read_cell(row[0]) != going.name.name)])


def _csv(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8", "backslashreplace")


def _inputs(data: bytes, going: Withdrawn) -> bytes:
    """The model's digest alone: those of the rows and tokens are of all rows, the client's among them."""
    del going
    known = json.loads(data)
    return _dump({key: known[key] for key in ("format", "model") if key in known})


_WRITERS: Mapping[str, Callable[[bytes, Withdrawn], bytes]] = {
    "recipe.yaml": _recipe,
    "roster.json": _roster,
    "trace.jsonl": _trace,
    "clients.csv": _table,
    "payout.csv": _payout,
    "inputs.json": _inputs,
    FORGOTTEN: _how_made,
    REPORT: _how_made,
}


def finish_written(draft: Path, source: Path, going: Withdrawn) -> None:
    """Write what follows from several files: the summary's digest of the recipe, contributions, and pictures.

    Args:
        draft: A folder with all other files.
        source: The run without the client, as it was.
        going: Who goes.

    Raises:
        LichenError: if the recipe, or what the pictures are drawn from, is damaged.
    """
    summary = json.loads((draft / "summary.json").read_text(encoding="utf-8"))
    summary["recipe_sha256"] = recipe_sha256(recipe_of(draft))
    write_atomic(draft / "summary.json", _dump(summary))
    read_summary(draft)
    if (source / CONTRIBUTIONS).is_file():
        found = read_contributions(source)
        names = tuple(going.instead if at == going.number else one for at, one in enumerate(found.clients))
        rounds = {
            at: replace(one, value={client: x for client, x in one.value.items() if client != going.number})
            for at, one in found.rounds.items()
        }
        found = replace(found, clients=names, rounds=rounds)
        found.write(draft)
        if (source / "contributions.png").is_file():
            contributions_png(draft, names, found.totals, str(summary["extra"].get("value", "")))
    if (source / "curves.png").is_file():
        curves_png(draft)
    if (source / "clients.png").is_file():
        rows = [{**row, "name": row["client"]} for row in read_clients(draft)]
        clients_png(draft, rows, metric=summary["metric"], higher_is_better=summary["higher_is_better"])
