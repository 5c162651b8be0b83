"""From records to token rows: what is read, and on which tokens a loss is taken.

Labels are -100 where no loss is taken. Every form puts something before the first learned token, so that
it can be predicted, and ends with the end token where it fits. A row that is too long loses the left of
its prompt first, down to half of the room, then the right of its text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.record import Record
from lichen.data.table import column_of

__all__ = ["LmForm", "encode_classify", "encode_lm", "label_set", "pad_id"]

LmForm = Literal["plain", "transcript", "chat", "messages"]
"""How a record becomes one sequence; see :func:`encode_lm`."""

Segment = tuple[str, bool]
"""A piece of text, and whether a loss is taken on it."""

FORMS = ("plain", "transcript", "chat", "messages")


def pad_id(tokenizer: Any) -> int:
    """The token that fills rows up: the padding token, else the end token.

    Raises:
        LichenError: if the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise LichenError("the tokenizer has no padding token", where="model.name", fix="set pad_token in its folder")


def label_set(records: Sequence[Record]) -> tuple[str, ...]:
    """The labels that occur, as text, sorted; numbers by value.

    >>> label_set([Record(client="", label=10), Record(client="", label=9), Record(client="")])
    ('9', '10')
    """
    found = {label for label in column_of(records, "label") if label is not None}
    if all(isinstance(label, int) for label in found):
        return tuple(str(label) for label in sorted(found, key=int))
    return tuple(sorted({str(label) for label in found}))


def encode_classify(
    records: Sequence[Record], tokenizer: Any, *, max_length: int, classes: Sequence[str]
) -> list[tuple[np.ndarray, int]]:
    """Token rows of texts, with the tokenizer's own special tokens, and their class.

    Args:
        records: Rows with text.
        tokenizer: A transformers tokenizer.
        max_length: Tokens a row has at most; the right is cut off.
        classes: Labels in class order, from :func:`label_set`.

    Returns:
        ``(input_ids, class)`` a row: int32 ids, and -100 where a record has no label.

    Raises:
        LichenError: if a label is not among the classes.
    """
    _check_length(max_length)
    number = {label: i for i, label in enumerate(classes)}
    if not records:
        return []
    encoded = tokenizer([r.text for r in records], truncation=True, max_length=max_length)["input_ids"]
    rows: list[tuple[np.ndarray, int]] = []
    for record, ids in zip(records, encoded, strict=True):
        if record.label is not None and str(record.label) not in number:
            raise LichenError(
                f"unknown label {str(record.label)!r}", where="data.columns.label", fix=f"known: {', '.join(classes)}"
            )
        label = -100 if record.label is None else number[str(record.label)]
        rows.append((np.array(ids or [pad_id(tokenizer)], dtype=np.int32), label))
    return rows


def encode_lm(
    records: Sequence[Record], tokenizer: Any, *, form: LmForm, max_length: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token rows of language modelling, with the label of every token.

    ==============  ====================================================================
    ``plain``       start token, text; loss on the text
    ``transcript``  start token, prompt, line break, text; loss on the text
    ``chat``        the tokenizer's chat template: prompt as user, text as assistant
    ``messages``    the record's conversation through the template; loss on assistant turns
    ==============  ====================================================================

    A template that would put in a system message of its own is given an empty one.

    Args:
        records: Rows with text, or with messages for that form.
        tokenizer: A transformers tokenizer.
        form: How a record becomes a sequence.
        max_length: Tokens a row has at most.

    Returns:
        ``(input_ids, labels)`` a record, int32 arrays of one length; labels are -100 or the token itself.

    Raises:
        LichenError: if the form is unknown, the tokenizer lacks what it needs, or a conversation has no
            assistant turn.
    """
    _check_length(max_length)
    if form not in FORMS:
        raise LichenError(f"unknown form {form!r}", where="data.form", fix=f"use one of: {', '.join(FORMS)}")
    if not records:
        return []
    end = tokenizer.eos_token_id
    if form in ("plain", "transcript"):
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
        if start is None:
            raise LichenError("the tokenizer has no start or end token", where="model.name", fix="use another model")
        before = [f"{r.prompt}\n" if form == "transcript" and r.prompt else "" for r in records]
        prompts, texts = _tokens(before, tokenizer), _tokens([r.text for r in records], tokenizer)
        close = [] if end is None else [int(end)]
        return [
            _fit([int(start)], prompt, [(text + close, True)], max_length)
            for prompt, text in zip(prompts, texts, strict=True)
        ]
    if not getattr(tokenizer, "chat_template", None):
        raise LichenError("the tokenizer has no chat template", where="data.form", fix='use "transcript" or "plain"')
    system = _system(tokenizer)
    segments = [_segments(_turns(record, form), system, tokenizer) for record in records]
    pieces = iter(_tokens([text for row in segments for text, _ in row], tokenizer))
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    for record, row in zip(records, segments, strict=True):
        parts = [(next(pieces), learned) for _, learned in row]
        if form == "chat" and sum(len(ids) for ids, _ in parts) > max_length:
            parts = _shorter_prompt(record, parts, system, tokenizer, max_length)
        if end is not None and _ends_bare(row, _turns(record, form)):
            parts[-1] = ([*parts[-1][0], int(end)], True)
        rows.append(_fit([], parts[0][0], parts[1:], max_length))
    return rows


def _check_length(max_length: int) -> None:
    if max_length < 4:
        raise LichenError(f"{max_length} tokens are too few", where="data.max_length", fix="use at least 4")


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _fit(
    start: list[int], prompt: list[int], rest: Sequence[tuple[list[int], bool]], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Join, cutting the prompt's left down to half the room, or to what the rest leaves, then the right."""
    length = sum(len(ids) for ids, _ in rest)
    room = max(max_length // 2, max_length - length) - len(start)
    parts = [(start, False), (prompt[max(len(prompt) - room, 0) :], False), *rest]
    ids = [token for part, _ in parts for token in part][:max_length]
    labels = [token if learned else -100 for part, learned in parts for token in part][:max_length]
    return np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32)


def _turns(record: Record, form: LmForm) -> list[Mapping[str, str]]:
    if form == "chat":
        return [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.text}]
    if not any(turn["role"] == "assistant" for turn in record.messages):
        raise LichenError(
            "a conversation has no assistant turn to learn from",
            where="data.columns.messages",
            fix='give each at least one {"role": "assistant", ...}, or use another form',
        )
    return list(record.messages)


def _render(turns: Sequence[Mapping[str, str]], tokenizer: Any, *, ask: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask))
    except Exception as error:
        # Templates are programs and raise what they like, most often about the order of roles.
        raise LichenError(
            f"the chat template refuses a conversation: {error}", where="data.form", fix='use form "transcript"'
        ) from None


def _system(tokenizer: Any) -> list[Mapping[str, str]]:
    """An empty system turn, if the template would otherwise write one of its own."""
    user, empty = {"role": "user", "content": "x"}, {"role": "system", "content": ""}
    try:
        shorter = len(_render([empty, user], tokenizer, ask=False)) < len(_render([user], tokenizer, ask=False))
    except LichenError:
        return []
    return [empty] if shorter else []


def _segments(turns: Sequence[Mapping[str, str]], system: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Segment]:
    """The rendered conversation in pieces that alternate between not learned and learned."""
    if turns[0]["role"] != "system":
        turns = [*system, *turns]
    whole = _render(turns, tokenizer, ask=False)
    segments: list[Segment] = []
    at = 0
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        begin = _render(turns[:i], tokenizer, ask=True)
        end = (whole if i == len(turns) - 1 else _render(turns[: i + 1], tokenizer, ask=False)).rstrip()
        if not (whole.startswith(begin) and whole.startswith(end) and at <= len(begin) <= len(end)):
            raise LichenError(
                "the chat template rewrites earlier turns, so an answer's tokens cannot be told apart",
                where="data.form",
                fix='use form "transcript", or conversations with one answer',
            )
        segments += [(whole[at : len(begin)], False), (whole[len(begin) : len(end)], True)]
        at = len(end)
    return segments


def _ends_bare(segments: Sequence[Segment], turns: Sequence[Mapping[str, str]]) -> bool:
    """Whether the template wrote nothing after the last answer, so that its end could not be learned."""
    last = [turn["content"].rstrip() for turn in turns if turn["role"] == "assistant"][-1]
    return last != "" and segments[-1][0].endswith(last)


def _shorter_prompt(
    record: Record,
    parts: list[tuple[list[int], bool]],
    system: Sequence[Mapping[str, str]],
    tokenizer: Any,
    max_length: int,
) -> list[tuple[list[int], bool]]:
    """Cut the user's words rather than the template around them; what then still is too long is cut by ``_fit``."""
    asked, answer = parts[0][0], parts[1][0]
    prompt = _tokens([record.prompt], tokenizer)[0]
    room = max(max_length // 2, max_length - len(answer)) - (len(asked) - len(prompt))
    if not 1 <= room < len(prompt):
        return parts
    left = tokenizer.decode(prompt[len(prompt) - room :]).lstrip("\ufffd")
    turns = [*system, {"role": "user", "content": left}]
    return [(_tokens([_render(turns, tokenizer, ask=True)], tokenizer)[0], False), *parts[1:]]
