"""Tokenises records, and masks the tokens without a loss.

Labels are -100 where no loss is taken. Every form puts something before the first learned token, so that
it can be predicted, and ends with the end token where it fits. A row is tokenised as one text. A row that is too
long loses the left of its prompt first, down to half of the room, then the right of its text; of a conversation
the template's frame stays.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from lichen.core.errors import LichenError
from lichen.data.chat.chat_template import chat_template_of
from lichen.data.chat.encode_chat import Row, encode_conversations, fit_tokens
from lichen.data.chat.messages import Turn
from lichen.data.chat.spans import tokenize
from lichen.data.sources.record import Record
from lichen.data.sources.table import column_of

__all__ = ["LmForm", "encode_classify", "encode_lm", "label_set", "pad_id", "sorted_labels", "start_id"]

LmForm = Literal["plain", "transcript", "chat", "messages"]
"""How a record becomes one sequence; see :func:`encode_lm`."""

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
    return sorted_labels(column_of(records, "label"))


def sorted_labels(labels: Sequence[str | int | None]) -> tuple[str, ...]:
    """The different ones among these labels, as text, sorted; numbers by value, and None left out."""
    found = {label for label in labels if label is not None}
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
    records: Sequence[Record],
    tokenizer: Any,
    *,
    form: LmForm,
    max_length: int,
    thinking: bool = False,
    notes: Counter[str] | None = None,
) -> list[Row]:
    """Token rows of language modelling, with the label of every token.

    ==============  ====================================================================
    ``plain``       start token, text; loss on the text
    ``transcript``  start token, prompt, line break, text; loss on the text
    ``chat``        the tokenizer's chat template: prompt as user, text as assistant
    ``messages``    the record's conversation through the template; loss on assistant turns
    ==============  ====================================================================

    The tokens are those of ``apply_chat_template(tokenize=True)``, up to the last one that is learned; a token
    across the border of an answer is learned with it. Where the template writes no end, the end token follows.

    Args:
        records: Rows with text, or with messages for that form.
        tokenizer: A transformers tokenizer.
        form: How a record becomes a sequence.
        max_length: Tokens a row has at most.
        thinking: The answers hold thoughts; see :func:`lichen.data.chat.chat_template.chat_template_of`.
        notes: Counts what a user should be told, by the keys of :data:`lichen.data.encode_notes.NOTES`.

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
    notes = Counter() if notes is None else notes
    notes["special"] += _special(records, tokenizer, form)
    if form in ("plain", "transcript"):
        return _texts(records, tokenizer, form, max_length, notes)
    template, _ = chat_template_of(tokenizer, thinking=thinking)
    turns = [_turns(record, form) for record in records]
    return encode_conversations(turns, tokenizer, template=template, max_length=max_length, notes=notes)


def _check_length(max_length: int) -> None:
    if max_length < 4:
        raise LichenError(f"{max_length} tokens are too few", where="data.max_length", fix="use at least 4")


def _texts(records: Sequence[Record], tokenizer: Any, form: LmForm, max_length: int, notes: Counter[str]) -> list[Row]:
    end = tokenizer.eos_token_id
    start = start_id(tokenizer)
    before = [f"{r.prompt}\n" if form == "transcript" and r.prompt else "" for r in records]
    whole = tokenize([f"{head}{r.text}" for head, r in zip(before, records, strict=True)], tokenizer)
    close = [] if end is None else [int(end)]
    rows = []
    for record, head, tokens in zip(records, before, whole, strict=True):
        (first, _), across = tokens.span(len(head), len(head) + len(record.text)) if head else ((0, 0), False)
        notes["across"] += across
        ids = [*tokens.ids, *close]
        rows.append(fit_tokens([start], ids[:first], ids[first:], ids[first:], max_length, notes))
    return rows


def start_id(tokenizer: Any) -> int:
    """The token that forms without a template begin with: the start token, else the end token.

    Raises:
        LichenError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise LichenError("the tokenizer has no start or end token", where="model.name", fix="use another model")


def _turns(record: Record, form: LmForm) -> tuple[Turn, ...]:
    if form == "messages":
        return record.messages
    return ({"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.text})


def _special(records: Sequence[Record], tokenizer: Any, form: LmForm) -> int:
    """Rows whose own words the tokenizer reads as special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    marks = [re.escape(str(token)) for token in added if token.special and str(token).strip()]
    if not marks:
        return 0
    found = re.compile("|".join(marks)).search

    def parts(record: Record) -> Iterator[str]:
        if form == "messages":
            yield from (turn["content"] for turn in record.messages)
            return
        yield record.text
        if form != "plain":
            yield record.prompt

    return sum(any(found(text) for text in parts(record)) for record in records)
