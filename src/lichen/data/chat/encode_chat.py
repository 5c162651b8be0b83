"""Encodes conversations as token rows of a bounded length, whole turns at a time.

A row that is too long is shortened as text and rendered again: the oldest exchanges go, then the left of the last
question, until prompt and answers share the room that the template's frame leaves, half and half; then the right is
cut off. Only where the frame itself takes more than three quarters of a row is it cut as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np

from lichen.data.chat.conversation import Conversation, exchanges, question, read_conversation, shorter
from lichen.data.chat.messages import Turn
from lichen.data.chat.spans import Span, Tokenized, tokenize

__all__ = ["Row", "encode_conversations", "fit_tokens"]

Row = tuple[np.ndarray, np.ndarray]
"""``(input_ids, labels)``, int32."""

PASSES: Final = 6
"""Times a conversation is shortened at most; the first cut is nearly always the last."""


def fit_tokens(
    start: list[int], prompt: list[int], rest: list[int], labels: list[int], max_length: int, notes: Counter[str]
) -> Row:
    """Join, cutting the prompt's left down to half the room, or to what the rest leaves, then the right.

    Args:
        start: Tokens that stay.
        prompt: Tokens before the first learned one.
        rest: All others.
        labels: Theirs.
        max_length: Tokens a row has at most.
        notes: Counts under ``prompt cut`` and ``text cut`` what was lost.
    """
    budget = max(max_length // 2, max_length - len(rest)) - len(start)
    prompt_ids = [*start, *prompt[max(len(prompt) - budget, 0) :]]
    notes["prompt cut"] += len(prompt) > budget
    notes["text cut"] += len(prompt_ids) + len(rest) > max_length
    ids, label_ids = [*prompt_ids, *rest][:max_length], [*[-100] * len(prompt_ids), *labels][:max_length]
    return np.array(ids, dtype=np.int32), np.array(label_ids, dtype=np.int32)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A conversation, its tokens, and which of them are learned."""

    conversation: Conversation
    tokens: Tokenized
    spans: tuple[Span, ...]
    end: int | None
    """Follows the last answer, where the template writes no end."""

    @property
    def first(self) -> int:
        """Tokens of the prompt."""
        return self.spans[0][0]

    @property
    def rest(self) -> int:
        """Tokens after the prompt."""
        return self.spans[-1][1] - self.first + (self.end is not None)


def encode_conversations(
    turns: Sequence[Sequence[Turn]], tokenizer: Any, *, template: str | None, max_length: int, notes: Counter[str]
) -> list[Row]:
    """Conversations as rows; all are rendered and tokenised in one call, and so are those that are shortened.

    Args:
        turns: Of each.
        tokenizer: The model's.
        template: Of the run; None: the tokenizer's own.
        max_length: Tokens a row has at most.
        notes: Counts what a user should be told.

    Raises:
        LichenError: as :func:`lichen.data.chat.conversation.read_conversation` does.
    """
    placed = dict(enumerate(_place(turns, tokenizer, template, notes)))
    over = _over(placed, tokenizer, max_length)
    notes["prompt cut"] += len(over)
    for _ in range(PASSES):
        cut = {
            n: made
            for n, (by, question_at) in over.items()
            if (made := shorter(placed[n].conversation, by, placed[n].tokens, question_at)) is not None
        }
        again = dict(zip(cut, _place(list(cut.values()), tokenizer, template, Counter()), strict=True))
        placed |= again
        over = _over(again, tokenizer, max_length)
        if not over:
            break
    return [_row(placed[n], max_length, notes) for n in range(len(placed))]


def _place(turns: Sequence[Sequence[Turn]], tokenizer: Any, template: str | None, notes: Counter[str]) -> list[_Placed]:
    read = [read_conversation(one, tokenizer, notes, template=template) for one in turns]
    out = []
    for one, tokens in zip(read, tokenize([one.text for one in read], tokenizer), strict=True):
        spans = [tokens.span(*learned) for learned in one.learned]
        notes["across"] += any(across for _, across in spans)
        end = tokenizer.eos_token_id if one.bare else None
        out.append(_Placed(conversation=one, tokens=tokens, spans=tuple(span for span, _ in spans), end=end))
    return out


def _over(placed: Mapping[int, _Placed], tokenizer: Any, max_length: int) -> dict[int, tuple[int, Tokenized]]:
    """Of rows whose prompt is too long: by how many tokens, and their last question."""
    long: dict[int, tuple[_Placed, str]] = {}
    for n, one in placed.items():
        question_at = question(one.conversation)
        if question_at is not None and one.first + one.rest > max_length:
            long[n] = one, one.conversation.turns[question_at]["content"]
    out: dict[int, tuple[int, Tokenized]] = {}
    words = tokenize([content for _, content in long.values()], tokenizer)
    for (n, (one, _)), encoded in zip(long.items(), words, strict=True):
        # With older exchanges to leave out, all of the prompt is in play; else what the frame leaves.
        frame = 0 if exchanges(one.conversation) else max(one.first - len(encoded.ids), 0)
        by = one.first - frame - max((max_length - frame) // 2, max_length - frame - one.rest, 1)
        if by > 0:
            out[n] = (by, encoded)
    return out


def _row(placed: _Placed, max_length: int, notes: Counter[str]) -> Row:
    stop = placed.spans[-1][1]
    ids, labels = placed.tokens.ids[:stop], [-100] * stop
    for begin, behind in placed.spans:
        labels[begin:behind] = ids[begin:behind]
    if placed.end is not None:
        ids, labels = [*ids, placed.end], [*labels, placed.end]
    if 4 * placed.first <= 3 * max_length or len(ids) <= max_length:
        notes["text cut"] += len(ids) > max_length
        return np.array(ids[:max_length], dtype=np.int32), np.array(labels[:max_length], dtype=np.int32)
    notes["frame cut"] += 1
    first, count = placed.first, Counter[str]()
    row = fit_tokens([], ids[:first], ids[first:], labels[first:], max_length, count)
    notes["text cut"] += count["text cut"]
    return row
