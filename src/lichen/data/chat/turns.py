"""Reads turns of a conversation in the shapes of OpenAI and ShareGPT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["is_turns", "turns_of"]

_ROLES: Mapping[str, str] = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "system": "system",
}
"""What speakers are called elsewhere."""


def turns_of(value: Any) -> list[Mapping[str, Any]]:
    """A cell's turns with the keys ``role`` and ``content``; a text is read as JSON.

    Names of speakers other than those of chat templates stay as they are, so that who reads them can refuse them.

    Raises:
        ValueError: if it is no list of objects.

    >>> turns_of([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]
    """
    turns = json.loads(value) if isinstance(value, str) else value
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("no list of turns")
    return [_turn(turn) for turn in turns]


def _turn(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    if "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    who, content = turn["from"], turn["value"]
    word = who.strip().lower() if isinstance(who, str) else ""
    if word == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": _call(content)}]}
    return {"role": _ROLES.get(word, who), "content": content}


def _call(content: Any) -> Any:
    """What a turn of ShareGPT's ``function_call`` calls: JSON with a name and arguments."""
    return json.loads(content) if isinstance(content, str) else content


def is_turns(value: Any) -> bool:
    """Whether a cell holds a conversation.

    >>> is_turns([{"role": "user", "content": "hi"}]), is_turns(["hi"])
    (True, False)
    """
    try:
        turns = turns_of(value) if not isinstance(value, str) or value.lstrip()[:1] == "[" else []
    except (ValueError, RecursionError):
        return False
    return bool(turns) and all(isinstance(turn.get("role"), str) for turn in turns)
