"""Reads a cell as the messages of a conversation, as a chat template takes them.

A turn is ``{"role": ..., "content": ...}`` with a text as content. A list of parts is joined where all are texts; a
turn that only calls tools has the content ``""``. What a template may ask for besides (tool calls, names, thoughts)
stays as it is; other keys are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lichen.core.errors import LichenError
from lichen.data.chat.turns import turns_of

__all__ = ["Turn", "messages_of"]

Turn = Mapping[str, Any]

TURN_ROLES = ("system", "developer", "user", "assistant", "tool")

_MORE = ("name", "tool_calls", "tool_call_id", "reasoning_content")
_SHAPE = 'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


def messages_of(value: Any, where: str) -> tuple[Turn, ...]:
    """The turns of one cell: a list of mappings, or its JSON; none of an empty cell.

    Args:
        value: The cell.
        where: The row, for errors.

    Raises:
        LichenError: if it is no list of turns, a role is unknown, or a content is no text.

    >>> messages_of('[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]', "row 1")
    ({'role': 'user', 'content': 'Hi'},)
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    try:
        turns = turns_of(value)
    except (ValueError, RecursionError):
        raise LichenError("messages must be a list of turns", where=where, fix=_SHAPE) from None
    return tuple(_turn(turn, where) for turn in turns)


def _turn(turn: Turn, where: str) -> Turn:
    role = turn.get("role")
    if role not in TURN_ROLES:
        what = f"a turn has the role {str(role)[:40]!r}" if "role" in turn else "a turn has no role"
        raise LichenError(f"{what}, which is not a known role", where=where, fix=f"roles: {', '.join(TURN_ROLES)}")
    calls = turn.get("tool_calls") or None
    made = {"role": role, "content": _content(turn, role, called=calls is not None, where=where)}
    more = {key: turn[key] for key in _MORE if turn.get(key) not in (None, "", [])}
    if calls is not None:
        more["tool_calls"] = _calls(calls, where)
    return made | more


def _content(turn: Turn, role: str, *, called: bool, where: str) -> str:
    content = turn.get("content")
    if content is None and called:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(_part(part, role, where) for part in content)
    raise LichenError(f"a turn of role {role} has no text as content", where=where, fix=_SHAPE)


def _part(part: Any, role: str, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = str(part.get("type", "?"))[:40] if isinstance(part, Mapping) else type(part).__name__
    if (
        isinstance(part, Mapping)
        and kind in ("text", "input_text", "output_text")
        and isinstance(part.get("text"), str)
    ):
        return str(part["text"])
    raise LichenError(
        f"a turn of role {role} holds a part of type {kind!r}, and only texts can be learned",
        where=where,
        fix="leave out rows with pictures, sound or files, or put their text in",
    )


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with arguments as a mapping, as templates print them; OpenAI's come as JSON text."""
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise LichenError("tool_calls must be a list of calls", where=where, fix='write [{"function": {"name": ...}}]')
    out = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise LichenError("a tool call names no function", where=where, fix='write {"function": {"name": ...}}')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, Mapping) else arguments
        made = {**function, "arguments": {} if arguments in (None, "") else arguments}
        out.append({**call, "type": call.get("type", "function"), "function": made} if "function" in call else made)
    return out
