"""Chooses the keys that follow from the data: length, clients, form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.data.batches.text import label_set
from lichen.data.sources.record import Record
from lichen.recipes.init.names import Roles, Wishes
from lichen.tasks.registry import task_of

__all__ = ["values_of"]

MOST_CLIENTS = 32
FEWEST_ROWS = 10
MOST_ROWS = 300

_WIDTHS = (32, 64, 128, 256, 512)


def _tokens(record: Record, chat: bool) -> int:
    """About how many tokens a row takes: four letters a token, fewer beyond ASCII, and a chat's template around it."""
    turns = [str(turn.get("content") or "") for turn in record.messages] or [record.prompt, record.text]
    text = "".join(turns)
    plain = sum(map(str.isascii, text)) if not text.isascii() else len(text)
    return plain // 4 + (len(text.encode("utf-8", "replace")) - plain) // 2 + (8 * len(turns) + 8 if chat else 2)


def values_of(
    data: Path, roles: Roles, wishes: Wishes, texts: Sequence[Record], by_file: bool
) -> tuple[dict[str, Any], list[str]]:
    """The recipe as a mapping, and sentences on what was assumed.

    Args:
        data: The file or folder, as the user named it.
        roles: Which column plays which role.
        wishes: What the user said.
        texts: The rows that were looked at, without empty ones.
        by_file: Whether files or folders are the clients.
    """
    task, notes = task_of(roles.task), list[str]()
    chat, numbers = task.writes, "numbers" in roles.columns
    if numbers and (wishes.model is not None or not task.students):
        raise LichenError(
            "holds numbers, and a foundation model reads texts",
            where=str(data),
            fix="leave out --model, and use task classify: a small network is trained",
        )
    lengths = sorted(_tokens(record, chat) for record in texts)
    most = lengths[int(0.95 * (len(lengths) - 1))]
    widths = (*_WIDTHS, 1024) if chat else _WIDTHS
    width = next((w for w in widths if w >= most), widths[-1])
    section: dict[str, Any] = {"name": str(data), "columns": roles.columns}
    section |= {} if numbers else {"max_length": width}
    model: dict[str, Any] = {"name": wishes.model or ("smollm2-135m" if chat else "minilm-l6")}
    if numbers:
        model = {"student": {"kind": "image-mlp", "width": 64}}
    elif wishes.model is not None and task.procedure.rounds:
        model["adapter"] = {"target_modules": "all-linear"}
    elif not chat and task.procedure.rounds:
        # From a head drawn at random, ten short rounds get no further than the commonest class.
        model["head"] = "ridge"
        model["adapter"] = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    if chat:
        form = (
            "messages"
            if "messages" in roles.columns or roles.turns
            else "chat"
            if "prompt" in roles.columns
            else "plain"
        )
        section["form"] = form
    if by_file and "client" not in roles.columns:
        section["partition"] = {"by": "client"}
        notes.append("Each file, or each folder of files, is a client.")
    elif "client" in roles.columns:
        section["partition"] = {"by": "client"}
        notes.append(f"Column {roles.columns['client']!r} tells the clients apart.")
    else:
        scarce = {"clients": max(len(texts) // FEWEST_ROWS, 2)} if len(texts) < 10 * FEWEST_ROWS else {}
        section["partition"] = {"by": "iid", **scarce}
        notes.append("No column tells clients apart, so rows are dealt out at random (data.partition).")
    if numbers:
        notes.append("Numbers are learned as they stand; those of about -1 to 1 are learned best.")
    if section["partition"]["by"] == "client":
        section |= _sizes(roles, texts, notes)
    if "group" not in roles.columns:
        section["split_by"] = "row"
    if "time" in roles.columns:
        notes.append(f"Column {roles.columns['time']!r} says when a row was written (data.columns.time).")
    section |= _labelled(roles, texts, notes) | _first_run(section["partition"]["by"], texts, notes)
    if len(texts) < 2 * FEWEST_ROWS:
        notes.append(f"Few rows ({len(texts)}): a run needs about {FEWEST_ROWS} for each client.")
    cut = 0 if numbers else sum(tokens > width for tokens in lengths)
    if cut:
        notes.append(f"{_share(cut, len(lengths))} of the rows are longer than {width} tokens and will be cut.")
    values = {
        "name": clipped(data.stem, 60) or "recipe",
        "task": roles.task,
        "model": model,
        "data": section,
        "optimizer": {"lr": [0.001]},
        "federation": {"rounds": 10, "local_steps": 4, "batch_size": 4},
        "compare": {"baselines": ["base", "alone", "alone_best", "pooled"], "alone_epochs": 2},
    }
    if task.prefers:
        values = {**values, "prefer": {"kind": "dpo", "beta": 0.1}, "optimizer": {"lr": [0.0005]}}
        notes.append("Of each pair the chosen answer is to gain on the rejected one (DPO).")
    if numbers:
        values["optimizer"] = {"name": "sgd", "lr": [0.1, 0.3], "momentum": 0.9}
        values["federation"] = {"rounds": 20, "local_steps": 8, "batch_size": 16, "aggregate": "mean"}
        values["compare"] = {"baselines": ["alone", "alone_best", "pooled"]}
    if not task.procedure.rounds:
        del values["optimizer"], values["federation"], values["compare"]
    return values, notes


def _sizes(roles: Roles, texts: Sequence[Record], notes: list[str]) -> dict[str, Any]:
    """Keys that keep clients out who could not take part, where there are such."""
    rows: dict[str, list[Record]] = {}
    for record in texts:
        rows.setdefault(record.client, []).append(record)
    found: dict[str, Any] = {}
    nobody = rows.pop("", [])
    if nobody:
        found["on_too_few_rows"] = "drop"
        notes.append(f"{len(nobody):,} of {len(texts):,} rows name no client and stay out.")
    enough = {name: of for name, of in rows.items() if len(of) >= FEWEST_ROWS}
    scarce = len(rows) - len(enough)
    if scarce and len(enough) >= 2:
        found |= {"min_rows": FEWEST_ROWS, "on_too_few_rows": "drop"}
        notes.append(f"{scarce:,} of {len(rows):,} clients have fewer than {FEWEST_ROWS} rows and stay out.")
    else:
        enough = rows
    if len(enough) > MOST_CLIENTS:
        found["max_clients"] = MOST_CLIENTS
        notes.append(f"{MOST_CLIENTS} of {len(enough):,} clients are drawn, so that a first run is short.")
    alone = sum(len({str(record.label) for record in of}) == 1 for of in enough.values())
    labelled = not task_of(roles.task).writes and task_of(roles.task).procedure.rounds
    if labelled and alone == len(enough):
        found["on_single_class"] = "keep"
        notes.append("Every client has rows of one class only: is its column rather the label?")
    elif labelled and alone:
        found["on_single_class"] = "drop"
        notes.append(f"{alone:,} of {len(enough):,} clients have rows of one class only and stay out.")
    return found


def _labelled(roles: Roles, texts: Sequence[Record], notes: list[str]) -> dict[str, Any]:
    """The classes by name, where some rows have none: rows of other labels stay out."""
    blank = sum(record.label is None for record in texts)
    if task_of(roles.task).writes or not blank:
        return {}
    notes.append(f"{blank:,} of {len(texts):,} rows have no label and stay out (data.classes).")
    return {"classes": list(label_set(texts))}


def _first_run(by: str, texts: Sequence[Record], notes: list[str]) -> dict[str, Any]:
    """Fewer rows of large clients, so that a first run takes minutes and is not all scoring."""
    own = Counter(record.client for record in texts).values() if by == "client" else [len(texts) // 10]
    if max(own) <= 2 * MOST_ROWS:
        return {}
    notes.append(f"At most {MOST_ROWS} rows of a client are used, so that a first run is short (data.max_rows).")
    return {"max_rows": MOST_ROWS, "test_rows": 50 if by == "client" else 200}


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    return "Less than 1 %" if share < 1 else f"About {share:.0f} %"
