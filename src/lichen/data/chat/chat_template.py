"""The chat template of a run: one prompt in training, scoring, ``lichen try``, export and federation.

A run changes nothing about a tokenizer's template but what its recipe asks for (``data.template``,
``data.system``), and, where the answers hold no thoughts, a generation prompt that opens one. The changes are
written into the template itself, so that whoever has the tokenizer, in this process or elsewhere, asks in the same
words with ``apply_chat_template(..., add_generation_prompt=True)``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lichen.core.errors import LichenError
from lichen.data.chat.messages import Turn

__all__ = ["chat_template_of", "render"]

_ASK: Turn = {"role": "user", "content": "Which one?"}
_ANSWER: Turn = {"role": "assistant", "content": "That one."}
_THOUGHT = re.compile(r"think|thought", re.IGNORECASE)


def render(turns: Sequence[Turn], tokenizer: Any, *, ask: bool, template: str | None = None) -> str:
    """The conversation as the template writes it.

    Args:
        turns: At least one.
        tokenizer: Whose template it is.
        ask: With the beginning of the assistant's next turn behind it.
        template: In place of the tokenizer's own.

    Raises:
        LichenError: if the template refuses it.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], chat_template=template, tokenize=False, add_generation_prompt=ask
            )
        )
    except Exception as error:
        # Templates are programs and raise what they like, most often about the order of roles.
        raise LichenError(
            f"the chat template refuses a conversation: {' '.join(str(error).split())}",
            where="data.form",
            fix="bring the turns into the order it asks for, give a template of your own in data.template, "
            'or use form "transcript"',
        ) from None


def chat_template_of(
    tokenizer: Any, *, template: str | None = None, system: str | None = None, thinking: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """The template that a run asks with, and sentences about what it changes.

    Args:
        tokenizer: Whose template is taken.
        template: In place of it.
        system: Text of the system turn of conversations that have none; ``""``: none where the template would write
            its own; None: what the template does.
        thinking: The answers hold thoughts, so that the generation prompt stays as it is.

    Returns:
        ``(template, notes)``; None where nothing is changed.

    Raises:
        LichenError: if there is no template, it cannot be read, or it takes no system message.
    """
    base = template if template is not None else _own(tokenizer)
    render([_ASK], tokenizer, ask=True, template=base) if template is None else _readable(tokenizer, template)
    made, notes = base, list[str]()
    if system is not None:
        made = _with_system(tokenizer, made, system)
    if not thinking:
        made, note = _without_thought(tokenizer, made)
        notes += note
    notes += _template_notes(tokenizer, made, thinking)
    return (None if made == base and template is None else made), tuple(notes)


def _template_notes(tokenizer: Any, template: str, thinking: bool) -> list[str]:
    """What a template does that makes its rows other than its prompts."""
    notes = []
    if "strftime_now" in template:
        notes.append("the chat template writes today's date: rows, and what is asked later, differ from day to day")
    if thinking:
        return notes  # what stands behind such a prompt is a thought
    question = render([_ASK], tokenizer, ask=True, template=template)
    whole, at = _answered(tokenizer, template)
    prompt, row = (list(ids) for ids in tokenizer([question, whole], add_special_tokens=False)["input_ids"])
    if whole.startswith(question) and at >= 0 and row[: len(prompt)] != prompt:
        notes.append(
            "the last tokens of a prompt are others once an answer follows, because this tokenizer joins letters or "
            "blanks across the border: a model sees the one in training and the other when it is asked"
        )
    return notes


def _own(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise LichenError(
            "the tokenizer has no chat template",
            where="data.form",
            fix='use "transcript" or "plain", or give a template in data.template',
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise LichenError(
            "the tokenizer has several chat templates, and none is the default",
            where="model.name",
            fix="give the one to use in data.template",
        ) from None


def _readable(tokenizer: Any, template: str) -> None:
    try:
        render([_ASK], tokenizer, ask=True, template=template)
    except LichenError as error:
        raise LichenError(
            error.what.replace("refuses a conversation", "cannot be used"),
            where="data.template",
            fix="see that it is a Jinja chat template",
        ) from None


def _with_system(tokenizer: Any, template: str, system: str) -> str:
    first = f"{{'role': 'system', 'content': {_literal(system)}}}"
    made = (
        "{%- if messages[0]['role'] not in ['system', 'developer'] -%}"
        f"{{%- set messages = [{first}] + messages -%}}{{%- endif %}}\n{template}"
    )
    before = render([_ASK], tokenizer, ask=True, template=template)
    try:
        after = render([_ASK], tokenizer, ask=True, template=made)
    except LichenError:
        after = before if not system else ""
    if not system:
        return made if len(after) < len(before) else template
    if system.strip() not in after:
        raise LichenError(
            "the chat template takes no system message",
            where="data.system",
            fix="remove it and say it in the prompts, or give a template that writes one in data.template",
        )
    return made


def _literal(text: str) -> str:
    """A text as Jinja reads it between quotes."""
    plain = text.encode("unicode_escape").decode("ascii").replace('"', '\\"')
    for sign in "{}%#":
        plain = plain.replace(sign, f"\\x{ord(sign):02x}")
    return f'"{plain}"'


def _without_thought(tokenizer: Any, template: str) -> tuple[str, list[str]]:
    """The template with a generation prompt that an answer without thoughts goes on from."""
    if _goes_on(tokenizer, template):
        return template, []
    if "enable_thinking" in template:
        off = (
            "{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif %}"
            f"\n{template}"
        )
        if _goes_on(tokenizer, off):
            return off, ["the chat template's enable_thinking is off, in training, scoring and whatever is asked later"]
    question = render([_ASK], tokenizer, ask=True, template=template)
    bare = render([_ASK], tokenizer, ask=False, template=template)
    whole, at = _answered(tokenizer, template)
    if at >= 0 and question.startswith(bare) and whole.startswith(bare):
        opened, closed = question[len(bare) :], whole[len(bare) : at]
        made = _replaced(template, opened, closed)
        if opened and _goes_on(tokenizer, made):
            return made, [
                "the chat template's prompt opens a thought, and the answers hold none (data.thinking): training, "
                f"scoring and whatever is asked later end in {closed!r} in place of {opened!r}"
            ]
    return template, []


def _answered(tokenizer: Any, template: str) -> tuple[str, int]:
    whole = render([_ASK, _ANSWER], tokenizer, ask=False, template=template)
    return whole, whole.rfind(_ANSWER["content"])


def _goes_on(tokenizer: Any, template: str) -> bool:
    """Whether an answered conversation begins with the prompt, with no thought in between."""
    try:
        question = render([_ASK], tokenizer, ask=True, template=template)
        whole, at = _answered(tokenizer, template)
    except LichenError:
        return False
    return whole.startswith(question) and len(question) <= at and not _THOUGHT.search(whole[len(question) : at])


def _replaced(template: str, opened: str, closed: str) -> str:
    """The template, and where it would end with one generation prompt, the other in its place."""
    body = template[:-1] if template.endswith("\n") else template
    # The line break after a block is trimmed, so that the template begins on a line of its own; the empty expression
    # keeps the next block from trimming its end.
    return (
        f"{{%- set rendered %}}\n{body}{{{{ '' }}}}{{%- endset -%}}"
        f"{{%- if add_generation_prompt and rendered.endswith({_literal(opened)}) -%}}"
        f"{{{{ rendered[:-{len(opened)}] + {_literal(closed)} }}}}{{%- else -%}}{{{{ rendered }}}}{{%- endif -%}}"
    )
