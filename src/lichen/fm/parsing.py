"""Parses generated text: which choice it names, and where it stops.

Naming is the way to ask an endpoint that tells no probabilities.

Legend: K choices.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["cut_at", "matched"]


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these marks.

    >>> cut_at("good. bad. end", (" end", "bad"))
    'good. '
    """
    return text[: min((text.index(stop_text) for stop_text in stop if stop_text in text), default=len(text))]


def matched(text: str, choices: Sequence[str]) -> int | None:
    """The number of the choice that a text names; None where it names none, or more than one.

    Case, spaces and punctuation aside, a choice is named if the text is it, else if the text begins with it,
    else if it stands somewhere in the text as whole words. Of choices that begin alike the longest counts.

    >>> matched(" Positive.", (" positive", " negative")), matched("It is not clear", ("positive", "negative"))
    (0, None)
    """
    answer_words, named = _words(text), [_words(choice) for choice in choices]
    for test in (_is, _begins, _holds):
        hits = [k for k, words in enumerate(named) if words and test(answer_words, words)]
        longest = [k for k in hits if not any(j != k and _holds(named[j], named[k]) for j in hits)]
        if len(longest) == 1:
            return longest[0]
        if hits:
            return None
    return None


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))


def _is(answer_words: tuple[str, ...], words: tuple[str, ...]) -> bool:
    return answer_words == words


def _begins(answer_words: tuple[str, ...], words: tuple[str, ...]) -> bool:
    return answer_words[: len(words)] == words


def _holds(answer_words: tuple[str, ...], words: tuple[str, ...]) -> bool:
    return any(answer_words[at : at + len(words)] == words for at in range(len(answer_words) - len(words) + 1))
