"""Recognises the shape of a data set: which column plays which role.

A shape is told by its columns' names first (instruction and output; chosen and rejected), and by what they hold
where names say nothing: the longest texts are learned, few short values that repeat are labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lichen.core.errors import LichenError
from lichen.core.visible import listed
from lichen.data.periods.moments import moment_of
from lichen.recipes.init.clients import client_of
from lichen.recipes.init.facts import ColumnFacts
from lichen.recipes.init.names import HOLDS, NAMES, QUESTIONS, Ask, Roles, Wishes, named
from lichen.tasks.registry import task_of

__all__ = ["roles_of"]

_LISTS = ("list", "numbers")


def roles_of(columns: Sequence[ColumnFacts], wishes: Wishes, *, where: str, by_file: bool, ask: Ask | None) -> Roles:
    """Which column plays which role.

    Args:
        columns: All columns.
        wishes: What the user said.
        where: The file, for errors.
        by_file: Whether files or folders are the clients.
        ask: Asks a person where several answers are as good; None where there is nobody.

    Raises:
        LichenError: if there is nothing to learn from, or a wish does not fit the data.
    """
    by_name = {column.name: column for column in columns}
    _check(wishes, by_name)
    roles = Roles()
    _learned(roles, columns, wishes, where, ask)
    if wishes.task is not None:
        roles.task = wishes.task
    if task_of(roles.task).writes:
        roles.columns.pop("label", None)
    elif "label" not in roles.columns or not {"text", "completion", "numbers"} & roles.columns.keys():
        raise LichenError(
            f"has no labels to learn, which task {roles.task} needs",
            where=where,
            fix=f"name the column: --label NAME; the columns are: {listed(by_name)}",
        )
    free = [column for column in columns if column.name not in roles.used]
    group = named("group", free, lambda column: column.repeats and column.kind != "real")
    client = client_of(roles, free, wishes, by_file, ask)
    time = named("time", [column for column in free if column.name != client], _is_time)
    roles.columns = {
        **({"client": client} if client else {}),
        **roles.columns,
        **({"group": group.name} if group is not None and group.name not in (client, time and time.name) else {}),
        **({"time": time.name} if time is not None else {}),
    }
    reasons = {**{column.name: _why(column, roles) for column in columns}, **roles.left}
    roles.left = {name: why for name, why in reasons.items() if name not in roles.used}
    return roles


def _check(wishes: Wishes, by_name: dict[str, ColumnFacts]) -> None:
    flags = {"client": wishes.client, "label": wishes.label, "text": wishes.text, "completion": wishes.completion}
    for flag, name in [*flags.items(), *(("prompt", name) for name in wishes.prompt)]:
        if name is not None and name not in by_name:
            raise LichenError(
                f"no column {name!r}", where=f"--{flag}", fix=f"the columns are: {listed(by_name, near=name)}"
            )
    if wishes.text is not None and (wishes.completion is not None):
        raise LichenError("goes without --completion", where="--text", fix="name one of the two")
    if wishes.label is not None and by_name[wishes.label].kind in ("numbers", "list", "object", "bytes", "real"):
        raise _no_label(by_name[wishes.label], "--label")


def _no_label(column: ColumnFacts, where: str) -> LichenError:
    if column.kind == "real":
        what = "holds real numbers, and classes are learned, not amounts"
        return LichenError(f"column {column.name!r} {what}", where=where, fix="name a column of classes, or make some")
    what = "holds lists: a row with several labels cannot be learned" if column.kind in _LISTS else "holds no labels"
    return LichenError(
        f"column {column.name!r} {what}",
        where=where,
        fix="write one label a row, name another column by --label, or leave labels out by --task chat",
    )


def _learned(roles: Roles, columns: Sequence[ColumnFacts], wishes: Wishes, where: str, ask: Ask | None) -> None:
    """The columns of what is learned, by the first shape that fits."""
    by_plain = {column.plain: column for column in columns}
    by_name = {column.name: column for column in columns}
    if wishes.text is not None or (wishes.label is not None and wishes.completion is None):
        _labelled(roles, columns, wishes, where, ask)
        return
    if {"chosen", "rejected"} <= by_plain.keys() and wishes.completion is None:
        if wishes.task in (None, "prefer"):
            _preferences(roles, by_plain, wishes, where)
            return
        wishes = replace(wishes, completion=by_plain["chosen"].name)
    if wishes.task == "prefer":
        raise LichenError(
            "holds no pairs of a chosen and a rejected answer",
            where=where,
            fix="call the columns chosen and rejected; rated rows need data.columns.rating and prefer.kind: kto in a "
            "recipe of your own",
        )
    if wishes.completion is not None:
        answer = by_name[wishes.completion]
        prompts = [by_name[name] for name in wishes.prompt] or _prompt_columns(columns, answer)
        _pair(roles, prompts, answer, where)
        return
    classify = wishes.task is not None and not task_of(wishes.task).writes
    talks = [column for column in columns if column.kind == "turns"]
    pair = [by_plain[name] for name in ("prompt", "completion") if name in by_plain and by_plain[name] in talks]
    if len(pair) == 2:
        _pair(roles, pair[:1], pair[1], where)
        return
    if talks and not classify:
        found = named("messages", talks, lambda column: True) or talks[0]
        roles.shape, roles.columns = "conversations", {"messages": found.name}
        return
    answer_of = named("completion", columns, _may_answer)
    prompts = [by_name[name] for name in wishes.prompt] or (
        _prompt_columns(columns, answer_of) if answer_of is not None else []
    )
    if answer_of is not None and prompts and not classify:
        _pair(roles, prompts, answer_of, where)
        return
    _labelled(roles, columns, wishes, where, ask)


def _is_time(column: ColumnFacts) -> bool:
    """Whether every filled cell says when its row was written, in a way that a stream can read."""
    if column.kind not in ("date", "number") or (column.kind == "number" and column.plain != "year"):
        return False
    return all(moment_of(text) is not None for text in column.counts)


def _may_answer(column: ColumnFacts) -> bool:
    """Texts, and the numbers that answer a question; numbers called ``target`` are classes."""
    return column.texts or (column.kind in ("number", "real") and column.plain != "target")


def _preferences(roles: Roles, by_plain: dict[str, ColumnFacts], wishes: Wishes, where: str) -> None:
    """Chosen and rejected answers, as texts or as turns, and what they answer."""
    pair = [by_plain["chosen"], by_plain["rejected"]]
    if len({column.kind == "turns" for column in pair}) > 1:
        raise LichenError(
            "holds turns in one of chosen and rejected, and texts in the other",
            where=where,
            fix="write both as texts, or both as lists of turns",
        )
    by_name = {column.name: column for column in by_plain.values()}
    known = [column for column in (by_plain.get("prompt"), by_plain.get("question")) if column is not None]
    prompts = tuple(by_name[name].name for name in wishes.prompt) or tuple(column.name for column in known[:1])
    roles.task, roles.shape = "prefer", "pairs of a chosen and a rejected answer"
    roles.turns = pair[0].kind == "turns"
    roles.columns = {
        **({"prompt": prompts if len(prompts) > 1 else prompts[0]} if prompts else {}),
        **{column.plain: column.name for column in pair},
    }


def _prompt_columns(columns: Sequence[ColumnFacts], answer: ColumnFacts) -> list[ColumnFacts]:
    """What an answer answers: an instruction and its input, or a context and its question, after a system's words."""
    free = [column for column in columns if column.texts and column.name != answer.name]
    if answer.kind == "turns":
        return [column for column in columns if column.plain == "prompt" and column.kind == "turns"]
    main = named("prompt", free, lambda column: True)
    if main is None and answer.plain in ("summary", "highlights", "translation", "reply"):
        main = named("text", free, lambda column: True) or named("messages", free, lambda column: True)
    if main is None:
        return []
    system = named("system", free, lambda column: True)
    context = named("context", free, lambda column: column.name != main.name)
    order = [system, context, main] if main.plain in QUESTIONS else [system, main, context]
    return [column for column in order if column is not None]


def _pair(roles: Roles, prompts: Sequence[ColumnFacts], answer: ColumnFacts, where: str) -> None:
    """What is asked and what is answered, as texts or as turns."""
    kinds = {column.kind == "turns" for column in (*prompts, answer)}
    if len(kinds) > 1:
        raise LichenError(
            "holds turns in one of prompt and completion, and texts in the other",
            where=where,
            fix="write both as texts, or both as lists of turns",
        )
    names = tuple(column.name for column in prompts)
    if answer.kind == "turns":
        roles.shape = "conversations"
        roles.columns = {"messages": (*names, answer.name) if names else answer.name}
    elif prompts:
        roles.shape = "prompts and answers"
        roles.columns = {"prompt": names if len(names) > 1 else names[0], "completion": answer.name}
    elif answer.texts:
        roles.shape, roles.columns = "texts", {"text": answer.name}
    else:
        raise LichenError(f"column {answer.name!r} holds no texts", where=where, fix="name another by --completion")


def _labelled(roles: Roles, columns: Sequence[ColumnFacts], wishes: Wishes, where: str, ask: Ask | None) -> None:
    """A text, and its label if there is one."""
    by_name = {column.name: column for column in columns}
    rest = [column for column in columns if column.name not in (wishes.label, wishes.client)]
    writes = wishes.task is not None and task_of(wishes.task).writes
    text = by_name[wishes.text] if wishes.text is not None else _text(rest) or (None if writes else _numbers(rest))
    if text is None:
        kinds = ", ".join(f"{column.name} ({HOLDS[column.kind]})" for column in columns[:8])
        several = sum(HOLDS[column.kind] == "numbers" for column in rest) > 1
        in_recipe = "; rows of numbers need a recipe of your own, with their columns in data.columns.numbers"
        raise LichenError(
            "has no column with text",
            where=where,
            fix=f"name one by --text; there is: {kinds}{' and more' if len(columns) > 8 else ''}"
            f"{in_recipe if several else ''}",
        )
    what, role = ("numbers", "numbers") if text.kind == "numbers" else ("texts", "text")
    roles.shape, roles.columns = what, {role: text.name}
    roles.task = "classify" if role == "numbers" else roles.task
    if writes:
        return
    free = [column for column in rest if column.name != text.name]
    label = by_name[wishes.label] if wishes.label is not None else _label(free, roles, where, ask)
    if label is not None and label.name in label.counts:
        raise LichenError(
            f"has no names of columns: {label.name!r} in its first line is one of the classes",
            where=where,
            fix="put a line of names above the rows, such as text,label",
        )
    if label is not None:
        roles.shape, roles.task = f"{what} with labels", "classify"
        roles.columns["label"] = label.name


def _text(columns: Sequence[ColumnFacts]) -> ColumnFacts | None:
    found = named("text", columns, lambda column: column.texts and not column.classes)
    if found is not None:
        return found
    free = [column for column in columns if column.kind == "text"]
    several = [column for column in free if not column.classes]
    several = (
        several or free or [column for column in columns if column.kind == "word" and column.plain in NAMES["text"]]
    )
    return max(several, key=lambda column: column.letters, default=None)


def _numbers(columns: Sequence[ColumnFacts]) -> ColumnFacts | None:
    """What is classified where there is no text; a list of labels is none."""
    free = [column for column in columns if column.kind == "numbers" and column.plain not in NAMES["label"]]
    return named("numbers", free, lambda column: True) or next(iter(free), None)


def _label(columns: Sequence[ColumnFacts], roles: Roles, where: str, ask: Ask | None) -> ColumnFacts | None:
    called = [column for column in columns if column.plain in NAMES["label"]]
    listed_ones = [column for column in called if column.kind in (*_LISTS, "object")]
    found = named("label", columns, lambda column: column.classes)
    if found is not None:
        return found
    if listed_ones:
        raise _no_label(listed_ones[0], where)
    for column in called:
        roles.left[column.name] = {
            "real": "real numbers: classes are learned, not amounts",
            "empty": "empty",
        }.get(column.kind, f"{len(column.counts)} different values in {column.filled} rows: no classes")
    units = {*NAMES["client"], *NAMES["place"], *NAMES["group"]}
    could = [column for column in columns if column.classes and column.plain not in units and column.kind != "number"]
    if len(could) > 1 and ask is not None:
        answers = [f"{column.name} ({len(column.counts)} classes)" for column in could]
        chosen = ask("Which column is the label?", [*answers, "none: learn to write such texts"])
        return could[chosen] if chosen < len(could) else None
    return could[0] if len(could) == 1 else None


def _is_small(column: ColumnFacts) -> bool:
    """Whether it could be a label: numbers with many values count something."""
    return column.classes and (column.kind != "number" or len(column.counts) <= 10)


def _why(column: ColumnFacts, roles: Roles) -> str:
    """Why a column plays no role."""
    if column.plain in ("tools", "functions"):
        return "tools: their definitions are not given to the model"
    if (not task_of(roles.task).writes or "text" in roles.columns) and _is_small(column):
        return f"could be the label: --label {column.name!r}"
    if _is_time(column) and "time" not in roles.columns:
        return f"dates: could be the time, by data.columns.time: {column.name}, where rows come period by period"
    return HOLDS[column.kind]
