"""Texts tokenised whole, and the tokens that a stretch of characters became.

A text is never tokenised in pieces: many tokenizers put a mark before every piece, or join letters across
a border, so that the pieces' tokens are not those of the text. A token that reaches across the beginning of a
stretch belongs to it, unless it is a special token, which is no part of what anybody wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from lichen.core.errors import LichenError

__all__ = ["Span", "Tokenized", "tokenize"]

Span = tuple[int, int]
"""Where something begins, and where what follows it begins."""


@final
class Tokenized:
    """One text's tokens.

    Attributes:
        ids: All of them, without special tokens that the tokenizer would put around the text.
    """

    __slots__ = ("_encoding", "_special", "_text", "_tokenizer", "ids")

    def __init__(self, text: str, ids: list[int], encoding: Any, tokenizer: Any, special: frozenset[int]) -> None:
        self.ids = ids
        self._text, self._encoding, self._tokenizer, self._special = text, encoding, tokenizer, special

    def span(self, begin: int, end: int) -> tuple[Span, bool]:
        """``(the tokens of these characters, whether the first one begins before them)``."""
        if self._encoding is None:
            return self._compared(begin, end)
        places = (at for at in range(begin, end) if self._token(at) is not None)
        place = next(places, None)
        if place is None:
            stop = self._after(end)
            return (stop, stop), False
        first = self._token(place)
        assert first is not None
        across = self._place(first)[0] < begin
        if across and self.ids[first] in self._special:
            first, across = first + 1, False
        # A tokenizer that trims its offsets gives blanks no place: those inside the stretch belong to it.
        while not across and first > 0 and begin <= self._place(first - 1)[0] == self._place(first - 1)[1]:
            first -= 1
        return (first, max(first, self._after(end))), across

    def start(self, token: int) -> int:
        """The character at which this token begins; for a tokenizer without offsets, as near as can be told."""
        if self._encoding is not None:
            return self._place(token)[0]
        return len(self._text) - len(str(self._tokenizer.decode(self.ids[token:])).lstrip("\ufffd"))

    def _token(self, at: int) -> int | None:
        token = self._encoding.char_to_token(at)
        return None if token is None else int(token)

    def _place(self, token: int) -> Span:
        place = self._encoding.token_to_chars(token)
        return (-1, 0) if place is None else (int(place[0]), int(place[1]))

    def _after(self, end: int) -> int:
        """The first token that begins at this character or after it."""
        for at in range(end, len(self._text)):
            token = self._token(at)
            if token is not None:
                return token if self._place(token)[0] >= end else token + 1
        return len(self.ids)

    def _compared(self, begin: int, end: int) -> tuple[Span, bool]:
        """By the tokens that the text has in common with its own beginnings."""
        before, first = self._common(begin)
        across = first < before
        if across and self.ids[first] in self._special:
            first, across = first + 1, False
        whole, stop = self._common(end)
        return (first, max(first, stop if stop == whole else stop + 1)), across

    def _common(self, at: int) -> tuple[int, int]:
        """``(tokens of the text up to here, how many of them are the whole text's)``."""
        if at >= len(self._text):
            return len(self.ids), len(self.ids)
        head = _ids([self._text[:at]], self._tokenizer)[0][0] if at else []
        same = 0
        while same < min(len(head), len(self.ids)) and head[same] == self.ids[same]:
            same += 1
        return len(head), same


def tokenize(texts: Sequence[str], tokenizer: Any) -> list[Tokenized]:
    """Every text's tokens, as ``apply_chat_template(tokenize=True)`` makes them of what it has rendered.

    Raises:
        LichenError: if the tokenizer cannot read a text.
    """
    if not texts:
        return []
    special = frozenset(int(i) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    found = _ids(texts, tokenizer)
    return [
        Tokenized(text, ids, encoding, tokenizer, special) for text, (ids, encoding) in zip(texts, found, strict=True)
    ]


def _ids(texts: Sequence[str], tokenizer: Any) -> list[tuple[list[int], Any]]:
    try:
        told = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception as error:  # tokenizers written in Python raise what they like
        raise LichenError(
            f"the tokenizer cannot read a text: {' '.join(str(error).split())}",
            where="model.name",
            fix="look for odd characters in the rows, or use another model",
        ) from None
    encodings = getattr(told, "encodings", None) or [None] * len(texts)
    return [(list(ids), encoding) for ids, encoding in zip(told["input_ids"], encodings, strict=True)]
