"""Tokenises a text whole, and maps spans of characters to tokens.

A text is never tokenised in pieces: many tokenizers put a mark before every piece, or join letters across
a border, so that the pieces' tokens are not those of the text. A token that reaches across the beginning of a
stretch belongs to it, unless it is a special token, which is no part of what anybody wrote.
"""

from __future__ import annotations

from bisect import bisect_right
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
        if not self._placed():
            return self._compared(begin, end)
        tokens_at = (at for at in range(begin, end) if self._token(at) is not None)
        place = next(tokens_at, None)
        if place is None:
            stop = self._after(end)
            return (stop, stop), False
        first = self._token(place)
        assert first is not None
        across = self._place(first)[0] < begin
        if across and self.ids[first] in self._special:
            first, across = first + 1, False
        first = first if across else self._back(first, begin)
        return (first, max(first, self._after(end))), across

    def start(self, token: int) -> int:
        """The character at which this token begins; for a tokenizer without offsets, as near as can be told."""
        if self._placed():
            return self._place(token)[0]
        return len(self._text) - len(str(self._tokenizer.decode(self.ids[token:])).lstrip("\ufffd"))

    def _placed(self) -> bool:
        """Whether it is known where each token stands in the text."""
        if self._encoding is None:
            self._encoding = _Spelled.of(self._text, self._tokenizer.convert_ids_to_tokens(self.ids)) or False
        return self._encoding is not False

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
                return self._back(token, end) if self._place(token)[0] >= end else token + 1
        return len(self.ids)

    def _back(self, token: int, at: int) -> int:
        """Before tokens without letters, such as marks and trimmed blanks, that stand at this character or after it."""
        while token > 0 and at <= self._place(token - 1)[0] == self._place(token - 1)[1]:
            token -= 1
        return token

    def _compared(self, begin: int, end: int) -> tuple[Span, bool]:
        """By the tokens that the text has in common with its own beginnings and endings."""
        first, across = self._border(begin)
        if across and self.ids[first] in self._special:
            first, across = first + 1, False
        stop, over = self._border(end)
        return (first, max(first, stop + over)), across

    def _border(self, at: int) -> tuple[int, bool]:
        """``(the first token that reaches past this character, whether it begins before it)``."""
        if at <= 0 or at >= len(self._text):
            return (0 if at <= 0 else len(self.ids)), False
        (head, _), (tail, _) = _ids([self._text[:at], self._text[at:]], self._tokenizer)
        behind = _common(tail[::-1], self.ids[::-1])
        if behind == len(tail):
            return len(self.ids) - behind, False
        before = _common(head, self.ids)
        if before == len(head):
            return before, False
        return max(before, len(self.ids) - behind - 1), True


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others)))


@final
class _Spelled:
    """Offsets of a tokenizer that gives none, where its tokens spell the text letter by letter."""

    __slots__ = ("starts",)

    def __init__(self, starts: list[int]) -> None:
        self.starts = starts

    @classmethod
    def of(cls, text: str, tokens: Sequence[str]) -> _Spelled | None:
        """None where they do not: letters were changed, or made into bytes."""
        at, starts = 0, []
        for token in tokens:
            plain = token.replace("▁", " ")
            if not text.startswith(plain, at):
                plain = plain[1:]  # a mark before a word, where the text has no blank
                if not (token.startswith("▁") and text.startswith(plain, at)):
                    return None
            starts.append(at)
            at += len(plain)
        return cls([*starts, at]) if at == len(text) else None

    def char_to_token(self, at: int) -> int | None:
        return bisect_right(self.starts, at) - 1 if at < self.starts[-1] else None

    def token_to_chars(self, token: int) -> Span:
        return self.starts[token], self.starts[token + 1]


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
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception as error:  # tokenizers written in Python raise what they like
        raise LichenError(
            f"the tokenizer cannot read a text: {' '.join(str(error).split())}",
            where="model.name",
            fix="look for odd characters in the rows, or use another model",
        ) from None
    encodings = getattr(encoded, "encodings", None) or [None] * len(texts)
    return [(list(ids), encoding) for ids, encoding in zip(encoded["input_ids"], encodings, strict=True)]
