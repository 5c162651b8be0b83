"""Renders a conversation with a chat template, and finds the spans that are learned.

An answer is learned where a model would be asked for it in just these words: its prompt, rendered by itself with
``add_generation_prompt=True``, must be the beginning of the whole, and the answer must stand there as it does
while it is the last. Templates that rewrite earlier turns (Qwen3 leaves out old thoughts) keep earlier answers
as context only; how many is counted. What stands behind the last answer is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.data.chat.chat_template import render
from lichen.data.chat.messages import Turn
from lichen.data.chat.spans import Span, Tokenized

__all__ = ["Conversation", "exchanges", "question", "read_conversation", "shorter"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One conversation as the template writes it.

    Attributes:
        turns: Up to the last answer that is learned.
        text: The whole.
        learned: Characters of each learned answer, with the end that the template gives it.
        first: The turn that the first of them is.
        bare: The template puts no end behind the last one.
    """

    turns: tuple[Turn, ...]
    text: str
    learned: tuple[Span, ...]
    first: int
    bare: bool


def read_conversation(
    turns: Sequence[Turn], tokenizer: Any, notes: Counter[str], *, template: str | None = None
) -> Conversation:
    """Render a conversation and find what is learned of it.

    Args:
        turns: As :func:`lichen.data.chat.messages.messages_of` gives them.
        tokenizer: The model's.
        notes: Counts what a user should be told.
        template: Of the run; None: the tokenizer's own.

    Raises:
        LichenError: if nothing of it could be learned, or the template leaves out a part that would be.
    """
    turns = _known(turns, template or str(tokenizer.chat_template), notes)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and _has_content(turn)]
    notes["empty"] += sum(turn["role"] == "assistant" for turn in turns) - len(answers)
    if not answers:
        raise LichenError(
            "a conversation has no assistant turn to learn from",
            where="data.columns.messages",
            fix='give each at least one {"role": "assistant", ...} that says something, or use another form',
        )
    turns = turns[: answers[-1] + 1]
    whole = render(turns, tokenizer, ask=False, template=template)
    learned: list[Span] = []
    answer_at: list[int] = []
    for i in answers:
        begin = _prompt_end(turns[:i], tokenizer, template, whole)
        if begin is None or (learned and begin < learned[-1][1]):
            continue
        rendered = whole if i == answers[-1] else render(turns[: i + 1], tokenizer, ask=False, template=template)
        end = _end(rendered, whole, str(tokenizer.eos_token or ""))
        if end is not None and end > begin:
            learned.append((begin, end))
            answer_at.append(i)
    if not learned or answer_at[-1] != answers[-1]:
        raise LichenError(
            "the chat template writes the last prompt of a conversation otherwise once it is answered, "
            "so the answer cannot be told apart",
            where="data.form",
            fix=_fix(turns),
        )
    notes["unlearned"] += len(answers) - len(answer_at)
    for i, (begin, end) in zip(answer_at, learned, strict=True):
        _check_whole(turns[i], whole[begin:end])
    notes["left out"] += any(
        turn["role"] in ("system", "developer", "user") and turn["content"].strip() not in whole for turn in turns
    )
    last = turns[answer_at[-1]]["content"].rstrip()
    return Conversation(
        turns=turns,
        text=whole,
        learned=tuple(learned),
        first=answer_at[0],
        bare=last != "" and whole[learned[-1][0] : learned[-1][1]].endswith(last),
    )


def question(conversation: Conversation) -> int | None:
    """The user's turn that the first learned answer answers."""
    turns = conversation.turns
    return next((i for i in range(conversation.first - 1, -1, -1) if turns[i]["role"] == "user"), None)


def exchanges(conversation: Conversation) -> list[int]:
    """The user's turns before the first learned answer, the first of them left out: where a shorter one may begin."""
    turns = conversation.turns
    return [i for i in range(conversation.first) if turns[i]["role"] == "user"][1:]


def shorter(
    conversation: Conversation, over: int, whole: Tokenized, before_answer: Tokenized
) -> tuple[Turn, ...] | None:
    """The turns with about so many tokens less before the first learned answer; None where nothing is left to cut.

    The oldest exchanges go first, then the left of the last question. The template's frame, the system turn and a token
    of the question stay.

    Args:
        conversation: A rendered one.
        over: Tokens that its prompt is too long by.
        whole: Its text, tokenised.
        before_answer: The content of its :func:`question`, tokenised.
    """
    turns, last = conversation.turns, question(conversation)
    if last is None:
        return None
    if starts := exchanges(conversation):
        begin = next(i for i, turn in enumerate(turns) if turn["role"] != "system")
        at = dict(zip(starts, _tokens_before(conversation, whole, starts), strict=True))
        saved = at[starts[0]] - _tokens_before(conversation, whole, [begin])[0]
        fewer = (i for i in starts if saved + at[i] - at[starts[0]] >= over)
        return (*turns[:begin], *turns[next(fewer, starts[-1]) :])
    content = turns[last]["content"]
    for token in range(min(over, len(before_answer.ids) - 1), len(before_answer.ids)):
        left = content[before_answer.start(token) :].lstrip()
        if 0 < len(left) < len(content):  # a mark for the beginning of a word has no letter of its own
            return (*turns[:last], {**turns[last], "content": left}, *turns[last + 1 :])
    return None


def _tokens_before(conversation: Conversation, whole: Tokenized, some: Sequence[int]) -> list[int]:
    """Tokens before the content of each of these turns, which come in order."""
    at, out = 0, []
    for i in some:
        found = conversation.text.find(conversation.turns[i]["content"].strip(), at)
        at = max(found, at)
        out.append(whole.span(at, len(conversation.text))[0][0])
    return out


def _known(turns: Sequence[Turn], template: str, notes: Counter[str]) -> tuple[Turn, ...]:
    """With ``developer`` as ``system`` where the template does not know it.

    Raises:
        LichenError: if it does not write tool calls that are there.
    """
    if any(turn["role"] == "developer" for turn in turns) and "developer" not in template:
        notes["developer"] += 1
        turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]
    if any("tool_calls" in turn for turn in turns) and "tool_calls" not in template:
        raise LichenError(
            "the chat template writes no tool calls",
            where="data.columns.messages",
            fix="give a template that does in data.template, or write the calls as text into content",
        )
    return tuple(turns)


def _has_content(turn: Turn) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _prompt_end(before: Sequence[Turn], tokenizer: Any, template: str | None, whole: str) -> int | None:
    """Where the answer begins; None where nobody would ask for it in these words."""
    try:
        before_answer = render(before, tokenizer, ask=True, template=template) if before else ""
    except LichenError:
        return None
    return len(before_answer) if before_answer and whole.startswith(before_answer) else None


def _end(rendered: str, whole: str, eos: str) -> int | None:
    """Where the answer ends that ``rendered`` ends with; None where it stands otherwise in the whole."""
    rendered = rendered.rstrip()
    if whole.startswith(rendered):
        return len(rendered)
    # Some templates end a conversation, rather than each answer, with the end token.
    inner = rendered.removesuffix(eos).rstrip() if eos else rendered
    return len(inner) if whole.startswith(inner) and inner != rendered else None


_CLOSED = re.compile(r"</\w*(?:think|thought)\w*>", re.IGNORECASE)
_OPENED = re.compile(r"^\s*<\w*(?:think|thought)\w*>", re.IGNORECASE)


def _thought(turn: Turn) -> str:
    """What an answer thinks before it says something."""
    if turn.get("reasoning_content"):
        return str(turn["reasoning_content"]).strip()
    closed = _CLOSED.search(turn["content"])
    return _OPENED.sub("", turn["content"][: closed.start()]).strip() if closed else ""


def _check_whole(turn: Turn, learned: str) -> None:
    """Raise if the template has left out a thought that should be learned."""
    if _thought(turn) not in learned:
        raise LichenError(
            "the chat template leaves out the thought of an answer that is learned",
            where="data.template",
            fix="give a template that writes it, or take the thoughts out of the rows",
        )


def _fix(turns: Sequence[Turn]) -> str:
    if any(_thought(turn) for turn in turns if turn["role"] == "assistant"):
        return "the answers hold thoughts: set data.thinking: true, or take them out of the rows"
    return "give a template whose prompt stays as it was asked in data.template, or use form transcript with a prompt"
