"""Finds in a text what may not go to an endpoint, and masks it, counts it, or refuses the text.

A finder says where something of one kind stands. What overlaps goes out as one, called by the surest, of equally sure
ones by the longest, so that no end of one stays behind. In the place of each stands its kind, such as ``[mail]``. What
is counted are kinds, never texts.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, final

from lichen.core.errors import LichenError

__all__ = ["Action", "ContentFilter", "Finder", "Found", "names_in", "private_runs"]

Action = Literal["mask", "count", "refuse"]

_WORD = re.compile(r"\w+")


@final
class Found(NamedTuple):
    """A stretch of a text that is of some kind.

    Attributes:
        start: Its first letter.
        end: The letter behind its last.
        kind: What it is.
        sure: From 0 to 1; a checksum that holds makes it 1.
    """

    start: int
    end: int
    kind: str
    sure: float


Finder = Callable[[str], Iterable[Found]]
"""Says what stands in a text."""


@final
class ContentFilter:
    """Looks through texts before they are sent; several threads may ask at once.

    Args:
        finders: What is looked for.
        action: ``mask`` puts the kind in its place; ``count`` sends it, and counts; ``refuse`` sends nothing.
        where: The recipe's key, for errors.

    Attributes:
        texts: Texts looked at.
    """

    def __init__(self, finders: Sequence[Finder], *, action: Action = "mask", where: str = "filter") -> None:
        self._finders, self._action, self._where = tuple(finders), action, where
        self._lock, self._counts = threading.Lock(), Counter[str]()
        self.texts = 0

    @property
    def counts(self) -> Mapping[str, int]:
        """How often each kind was found so far."""
        with self._lock:
            return dict(self._counts)

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The texts as they may be sent.

        Raises:
            LichenError: where something is found and the action is ``refuse``; it names kinds and numbers alone.
        """
        out: list[str] = []
        counts = Counter[str]()
        for text in texts:
            found = self.found(text)
            counts.update(one.kind for one in found)
            out.append(_masked(text, found) if self._action == "mask" else text)
        with self._lock:
            self._counts.update(counts)
            self.texts += len(texts)
        if counts and self._action == "refuse":
            what = ", ".join(f"{number} of {kind}" for kind, number in sorted(counts.items()))
            fix = "take it out of what is sent, or set action: mask"
            raise LichenError(f"would send what the filter refuses: {what}", where=self._where, fix=fix)
        return out

    def found(self, text: str) -> list[Found]:
        """What stands in a text, from left to right; none overlaps another."""
        every = [one for finder in self._finders for one in finder(text)]
        merged: list[Found] = []
        for one in sorted(every):
            if merged and one.start < merged[-1].end:
                last = merged[-1]
                first = max(one, last, key=lambda f: (f.sure, f.end - f.start))
                merged[-1] = first._replace(start=last.start, end=max(one.end, last.end))
            else:
                merged.append(one)
        return merged


def _masked(text: str, found: Sequence[Found]) -> str:
    parts, at = [], 0
    for one in found:
        parts += [text[at : one.start], f"[{one.kind}]"]
        at = one.end
    return "".join([*parts, text[at:]])


def names_in(file: Path, *, where: str) -> Finder:
    """Finds the names of a list, one a line, as whole words in small or capital letters.

    Raises:
        LichenError: if the file cannot be read, or holds no name.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LichenError(f"cannot be read: {error}", where=where, fix="name a text file with a name a line") from None
    names = sorted({" ".join(line.split()) for line in lines if line.strip()}, key=lambda name: (-len(name), name))
    if not names:
        raise LichenError(f"{file} holds no name", where=where, fix="write a name a line")
    every = "|".join(r"\s+".join(map(re.escape, name.split())) for name in names)
    pattern = re.compile(rf"(?<!\w)(?:{every})(?!\w)", re.IGNORECASE)

    def find(text: str) -> Iterator[Found]:
        return (Found(*match.span(), "name", 0.9) for match in pattern.finditer(text))

    return find


def private_runs(rows: Iterable[str], words: int, *, where: str) -> Finder:
    """Finds each stretch of a text in which every ``words`` words in a row stand in a private row as well.

    Words are letters and digits; capitals, signs and line ends do not count.

    Args:
        rows: The private rows.
        words: How many words are a run.
        where: The recipe's key, for errors.

    Raises:
        LichenError: if no row has so many.
    """
    known = {run for row in rows for run, _, _ in _runs(row, words)}
    if not known:
        fix = "lower it, or remove it"
        raise LichenError(f"no private row has {words} words", where=where, fix=fix)

    def find(text: str) -> Iterator[Found]:
        start = end = -1
        for run, first, last in _runs(text, words):
            if run not in known:
                continue
            if first > end >= 0:
                yield Found(start, end, "row", 1.0)
                start = first
            elif start < 0:
                start = first
            end = last
        if start >= 0:
            yield Found(start, end, "row", 1.0)

    return find


def _runs(text: str, words: int) -> Iterator[tuple[int, int, int]]:
    """``(hash of the words, first letter, end)`` of every run of so many words."""
    found = list(_WORD.finditer(text))
    small = [match[0].casefold() for match in found]
    for k in range(len(found) - words + 1):
        yield hash(tuple(small[k : k + words])), found[k].start(), found[k + words - 1].end()
