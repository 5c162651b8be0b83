"""Cleans generated text: one paragraph of whole sentences.

Models that follow instructions announce what they are about to write, put it in quotes, name its kind
and mark it up; all of them are cut off in the middle of a sentence when their tokens run out. Nothing is
added here and no word is changed, so that a text that cannot be saved comes out empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["clean", "word_count"]

_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|\\w+")
_END = re.compile("(?:[.!?…]+[\"'”’)\\]*]*(?=\\s|$)|[。！？]+[」』”’)]*)")
_CHATTER = (
    re.compile(r"(?:sure|certainly|of course|okay|absolutely)(?: thing)?\s*[!,.]\s*(?=here|below|this)", re.I),
    re.compile(r"(?:here(?:['’]s| is| are)|below is|this is)\b[^\n:]{0,120}:\s+", re.I),
    re.compile(r"(?:sure|certainly|of course|okay)\b[^\n]{0,80}[:!]\s*\n", re.I),
    re.compile(r"(?:rating|stars?|title|subject)\s*:[^\n]*\n\s*", re.I),
    re.compile(r"[*#_>\-•]+\s*|\d+[.)]\s+"),
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "`": "`", "'": "'", "‘": "’", "「": "」"}


def word_count(text: str) -> int:
    """Words of a text; scripts without spaces by character."""
    return len(_WORD.findall(text))


def clean(text: str, *, kind: str = "text", least: int = 1, stop: Sequence[str] = ()) -> str:
    """The first paragraph of at least ``least`` words in whole sentences, bare; empty where there is none.

    Args:
        text: As it was written.
        kind: What a text is called, where the model calls it so ("Review (5 stars): ...").
        least: Words.
        stop: The text ends before the first of these.

    >>> clean('Sure! Here is a review:\\n\\n"It fits me well. The colour is', kind="review")
    'It fits me well.'
    """
    before = None
    while text != before:  # under quotes there may be chatter again
        before, text = text, _clean_once(text, kind, least, stop)
    return text


def _clean_once(text: str, kind: str, least: int, stop: Sequence[str]) -> str:
    text = text.strip()
    for end in stop:
        text = text.split(end)[0]
    named = re.compile(rf"\**(?:(?:new|finished|customer)\s+)?{re.escape(kind)}\b[^\n:.!?]{{0,80}}:\**\s*", re.I)
    for chatter in (*_CHATTER, named):
        found = chatter.match(text)
        text = text[found.end() :].lstrip() if found else text
    if any(chatter.match(text) for chatter in (*_CHATTER, named)):
        return text
    for paragraph in re.split(r"\n\s*\n", text):
        whole = _whole(_bare(" ".join(paragraph.split())))
        if word_count(whole) >= least:
            return whole
    return ""


def _bare(text: str) -> str:
    """Without quotes around all of it, and without marks of emphasis."""
    text = text.replace("**", "").strip()
    closing = _QUOTES.get(text[:1])
    if closing is None:
        return text
    inner = text[1:].removesuffix(closing)
    # A quote that ends inside belongs to the text.
    return text if closing in inner and closing not in "'’" else inner.strip()


def _whole(text: str) -> str:
    """Up to the end of the last sentence that has one."""
    ends = [found.end() for found in _END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""
