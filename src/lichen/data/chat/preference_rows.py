"""Reads the cells of a row of preferences: a chosen and a rejected answer, as texts or as turns, and a rating.

Where answers are turns, as TRL writes them, the last turn is the answer and all before it the context: the turns of
the prompt where there is such a column, else those that both conversations begin with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.data.chat.messages import Turn, messages_of
from lichen.data.chat.turns import is_turns
from lichen.data.formats.cells import text_of

__all__ = ["Answers", "answers_of", "rating_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A prompt with two answers.

    Attributes:
        prompt: Its last words of a user.
        chosen: The better answer; empty where the row has none.
        rejected: The worse one; empty where the row has none.
        messages: The whole conversation with the chosen answer; none where the cells are texts.
    """

    prompt: str
    chosen: str
    rejected: str
    messages: tuple[Turn, ...] = ()


def answers_of(row: Mapping[str, Any], known: Mapping[str, Sequence[str]], where: str) -> Answers:
    """The answers of one row.

    Args:
        row: By column.
        known: The columns of each role.
        where: Its file and row, for an error.

    Raises:
        LichenError: if one answer is turns and the other is not, the two do not answer the same turns, or an answer is
            no turn of the assistant.
    """

    def cells(role: str) -> list[tuple[str, Any]]:
        found = [(column, row.get(column)) for column in known.get(role, ())]
        return [(column, None if isinstance(value, list) and not value else value) for column, value in found]

    def text(role: str) -> str:
        return "\n\n".join(filter(None, (text_of(value, column, where) for column, value in cells(role))))

    def turns(role: str) -> tuple[Turn, ...]:
        return tuple(turn for column, value in cells(role) for turn in messages_of(value, f"{where}, {column}"))

    talks = {role: any(is_turns(value) for _, value in cells(role)) for role in ("chosen", "rejected")}
    if not any(talks.values()):
        return Answers(prompt=text("prompt"), chosen=text("chosen"), rejected=text("rejected"))
    absent = [role for role, there in talks.items() if not there and text(role)]
    if absent:
        raise LichenError(
            f"column {absent[0]!r} holds texts, and the other answer is turns",
            where=where,
            fix="write both answers as texts, or both as lists of turns",
        )
    if not talks["chosen"]:
        return Answers(prompt="", chosen="", rejected="")
    before = turns("prompt") if any(is_turns(value) for _, value in cells("prompt")) else None
    if before is None and (question := text("prompt")) and len(turns("chosen")) == 1:
        before = ({"role": "user", "content": question},)
    context, chosen = _answer(turns("chosen"), before, "chosen", where)
    rejected = ""
    if talks["rejected"]:
        other, rejected = _answer(turns("rejected"), before, "rejected", where)
        if other != context:
            raise LichenError(
                "the chosen and the rejected conversation do not answer the same turns",
                where=where,
                fix="let both begin alike, and differ in their last turn alone",
            )
    words = [turn["content"] for turn in context if turn["role"] == "user"]
    last: Turn = {"role": "assistant", "content": chosen}
    return Answers(prompt=words[-1] if words else "", chosen=chosen, rejected=rejected, messages=(*context, last))


def _answer(
    turns: tuple[Turn, ...], before: tuple[Turn, ...] | None, role: str, where: str
) -> tuple[tuple[Turn, ...], str]:
    """``(context, answer)``; the prompt's turns may stand before the answer or within its column."""
    if not turns:
        return (), ""
    *head, last = turns
    if last["role"] != "assistant":
        raise LichenError(
            f"the last turn of {role!r} is of role {last['role']}, and an answer is the assistant's",
            where=where,
            fix="end each conversation with a turn of role assistant",
        )
    context = tuple(head)
    if before is not None and context[: len(before)] != before:
        context = (*before, *context)
    return context, str(last["content"])


_TRUTHS = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}


def rating_of(value: Any, column: str, where: str) -> float | None:
    """A cell as a rating; None where it is empty, and true as 1.

    Raises:
        LichenError: if it is no number.

    >>> rating_of(True, "liked", "row 1"), rating_of("7.5", "stars", "row 2"), rating_of("", "stars", "row 3")
    (1.0, 7.5, None)
    """
    if isinstance(value, bool):
        return float(value)
    words = text_of(value, column, where).strip()
    if not words:
        return None
    number = _TRUTHS.get(words.lower())
    try:
        number = float(words) if number is None else number
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise LichenError(
            f"column {clipped(column, 60)!r} holds {clipped(words, 40)!r}, which is no rating",
            where=where,
            fix="write a number, true and false or yes and no, or name another column in data.columns.rating",
        )
    return number
