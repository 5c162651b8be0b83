"""Describes what each column holds: texts, words, numbers, dates, ids, conversations.

Names are looked at later: what a column holds decides what it cannot be, so that an id is never learned as text.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lichen.data.chat.turns import is_turns

__all__ = ["MOST_CLASSES", "ColumnFacts", "Kind", "columns_of"]

Kind = Literal[
    "empty",
    "turns",
    "numbers",
    "list",
    "object",
    "bytes",
    "truth",
    "number",
    "real",
    "date",
    "link",
    "id",
    "word",
    "text",
]

MOST_CLASSES = 100
_LOOKED_AT = 2000
_LONGEST_LABEL = 60

_DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}([ T].*)?|\d{1,2}:\d{2}(:\d{2})?.*"
    r"|(\d{1,2}\.? )?(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? \d{1,2},? \d{2,4}.*"
    r"|\d{1,2}\.? (jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?,? \d{2,4}.*",
    re.I,
)
_NUMBER = re.compile(r"[-+]?[$€£]?(\d[\d.,']*|\.\d+)(e[-+]?\d+)?\s*[%$€£]?", re.I)
_WHOLE = re.compile(r"[-+]?\d+(\.0+)?")
_LINK = re.compile(r"(https?://|ftp://|s3://|www\.)\S+|[\w.+-]+@[\w-]+\.[\w.]+", re.I)
_CODE = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{16,}|[\w.:/#-]*\d[\w.:/#-]*", re.I)
_ID_NAME = re.compile(
    r"(^|_)(id|ids|uuid|guid|hash|sha256|md5|key|index|idx|no|nr|number|url|link|file|filename|path)$"
)
_PLAIN_NAME = re.compile(r"[^0-9a-z]+")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnFacts:
    """One column of the rows that were looked at.

    Attributes:
        name: As the file has it.
        kind: What it holds.
        rows: How many rows were looked at.
        filled: How many of them have something in it.
        counts: How often each value stands there; empty for lists, objects and bytes.
        letters: Mean letters of a filled cell.
    """

    name: str
    kind: Kind
    rows: int
    filled: int
    counts: Mapping[str, int]
    letters: float

    @property
    def plain(self) -> str:
        """The name in small letters, with underscores for all that is no letter or digit.

        >>> ColumnFacts(name="Clothing ID", kind="number", rows=0, filled=0, counts={}, letters=0).plain
        'clothing_id'
        """
        return _PLAIN_NAME.sub("_", self.name.lower()).strip("_")

    @property
    def texts(self) -> bool:
        """Whether it can be learned as text."""
        return self.kind in ("text", "word")

    @property
    def classes(self) -> bool:
        """Whether its values can be classes: few of them, short, and each of several rows on average."""
        if self.kind not in ("word", "text", "number", "truth") or not 2 <= len(self.counts) <= MOST_CLASSES:
            return False
        return 2 * len(self.counts) <= self.filled and max(map(len, self.counts)) <= _LONGEST_LABEL

    @property
    def repeats(self) -> bool:
        """Whether its values stand for several rows each on average, as clients and groups do."""
        return bool(self.counts) and 2 * len(self.counts) <= self.filled


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[ColumnFacts]:
    """Every column of some rows, in the order they come.

    >>> [(c.name, c.kind) for c in columns_of([{"id": "a1", "said": "good day to you", "n": 1.5}])]
    [('id', 'id'), ('said', 'text'), ('n', 'real')]
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return [_column(str(name), [row.get(name) for row in rows]) for name in names]


def _column(name: str, cells: Sequence[Any]) -> ColumnFacts:
    values = [value for value in cells if not _nothing(value)]
    scalar = [str(value).strip() for value in values if isinstance(value, (str, int, float))]
    counts = Counter(scalar) if len(scalar) == len(values) else Counter[str]()
    return ColumnFacts(
        name=name,
        kind=_kind(name, values[:_LOOKED_AT], counts),
        rows=len(cells),
        filled=len(values),
        counts=counts,
        letters=sum(map(len, scalar)) / max(len(scalar), 1),
    )


def _nothing(value: Any) -> bool:
    return (
        value is None
        or value in ([], {})
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _kind(name: str, values: Sequence[Any], counts: Mapping[str, int]) -> Kind:
    if not values:
        return "empty"
    if all(is_turns(value) for value in values):
        return "turns"
    if all(_is_numbers(value) for value in values):
        return "numbers"
    other: dict[type, Kind] = {list: "list", tuple: "list", dict: "object", bytes: "bytes"}
    for value in values:
        if type(value) in other:
            return other[type(value)]
    if all(isinstance(value, bool) for value in values):
        return "truth"
    texts = [str(value).strip() for value in values]
    plain = _PLAIN_NAME.sub("_", name.lower()).strip("_")
    different = 1 < len(counts) == sum(counts.values())
    if different and _ID_NAME.search(plain) and not _mostly(_LINK, texts) and not any(" " in text for text in texts):
        return "id"
    if all(_NUMBER.fullmatch(text) for text in texts):
        return "number" if all(_WHOLE.fullmatch(text) for text in texts) else "real"
    for pattern, kind in ((_DATE, "date"), (_LINK, "link")):
        if _mostly(pattern, texts):
            return kind  # type: ignore[return-value]
    spaced = sum(" " in text or "\n" in text for text in texts)
    if not spaced and (_ID_NAME.search(plain) or (different and _mostly(_CODE, texts))):
        return "id"
    # Without blanks between words, as in Chinese, a text is told by its length.
    long = sum(len(text) for text in texts) / len(texts) > (30 if all(map(str.isascii, texts)) else 8)
    return "text" if 2 * spaced >= len(texts) or long else "word"


def _is_numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of such lists, also as a CSV has it."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(_is_numbers(one) or (isinstance(one, (int, float)) and not isinstance(one, bool)) for one in value)


def _mostly(pattern: re.Pattern[str], texts: Sequence[str]) -> bool:
    return 10 * sum(pattern.fullmatch(text) is not None for text in texts) >= 9 * len(texts)
