"""Finds near-duplicate texts exactly, over normalised words.

Two questions. Which of some texts say the same as an earlier one (:func:`twins`)? Near equality is the
Jaccard similarity of their word shingles; all pairs above a threshold are found by prefix filtering, so that
nothing is missed and few pairs are compared. And which texts give a private row away (:class:`NearDuplicates`)? A
foundation model may repeat what it has read, and a repeated run of eight words is rarely chance; a run
breaks at the first word that was changed, so that windows in which many shingles of one private row
stand close together count as well.

References:
    Roberto J. Bayardo, Yiming Ma and Ramakrishnan Srikant. "Scaling Up All Pairs Similarity Search." WWW
    2007. https://doi.org/10.1145/1242572.1242591
    Katherine Lee, Daphne Ippolito, Andrew Nystrom, Chiyuan Zhang, Douglas Eck, Chris Callison-Burch and
    Nicholas Carlini. "Deduplicating Training Data Makes Language Models Better." ACL 2022.
    https://arxiv.org/abs/2107.06499

Legend: M candidates, N private rows, H width of an embedding.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from lichen.core.errors import LichenError

__all__ = ["NearDuplicates", "close_M", "jaccard", "shingles", "twins", "words"]

_HIDDEN = re.compile("['’‘`´\u00ad\u200b-\u200f\u2060\ufeff]")
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W_\u3040-\u30ff\u3400-\u9fff]+")

Shingle = tuple[str, ...]


def words(text: str) -> list[str]:
    """The text's words without case, punctuation and invisible signs; scripts without spaces by character.

    >>> words("Don't  wash—it SHRINKS!")
    ['dont', 'wash', 'it', 'shrinks']
    """
    return _WORD.findall(_HIDDEN.sub("", unicodedata.normalize("NFKC", text)).casefold())


def shingles(text: str, size: int = 3) -> frozenset[Shingle]:
    """All runs of ``size`` words; a shorter text is one run, and a text without words is itself."""
    found = words(text) or [text.strip()]
    return frozenset(tuple(found[i : i + size]) for i in range(max(len(found) - size, 0) + 1))


def jaccard(a: frozenset[Shingle], b: frozenset[Shingle]) -> float:
    """Shared of all shingles, from 0 to 1; two empty sets are alike."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if a or b else 1.0


def twins(texts: Sequence[str], *, against: Sequence[str] = (), threshold: float = 0.7, size: int = 3) -> list[int]:
    """For every text the first text before it that is kept and near to it, -1 where there is none.

    Texts are looked at in order, and kept where none before is near. Two sets of Jaccard similarity t or
    more share at least t of either, so that in any common order of all shingles they share one of
    their first ``n - ceil(t n) + 1``; with the rarest first, few others do.

    Args:
        texts: To be told apart.
        against: Texts that stand before them and are always kept; the answer counts them first.
        threshold: Jaccard similarity from which two texts are near, above 0 and at most 1.
        size: Words of a shingle.

    Returns:
        Positions in ``[*against, *texts]``, one a text.

    Raises:
        LichenError: if a number is out of range.
    """
    if not 0 < threshold <= 1 or size < 1:
        raise LichenError(
            f"a threshold of {threshold} for shingles of {size} words is out of range",
            where="filters.duplicates",
            fix="use a threshold above 0 and at most 1, and shingles of 1 word or more",
        )
    sets = [shingles(text, size) for text in (*against, *texts)]
    frequency = Counter(one for some in sets for one in some)
    rows_by: defaultdict[Shingle, list[int]] = defaultdict(list)
    nearest = []
    for at, some in enumerate(sets):
        ordered = sorted(some, key=lambda one: (frequency[one], one))
        prefix = ordered[: len(some) - math.ceil(threshold * len(some) - 1e-9) + 1]
        near = [other for other in sorted({k for one in prefix for k in rows_by[one]}) if at >= len(against)]
        first = next((other for other in near if jaccard(some, sets[other]) >= threshold), -1)
        if first < 0:
            for one in prefix:
                rows_by[one].append(at)
        nearest.append(first)
    return nearest[len(against) :]


def close_M(candidates_MH: Tensor, private_NH: Tensor, *, cosine: float = 0.95) -> Tensor:
    """Whether each candidate's embedding has this cosine or more with a private row's; bool ``(M,)``."""
    if not len(private_NH) or not len(candidates_MH):
        return torch.zeros(len(candidates_MH), dtype=torch.bool)
    a_MH, b_NH = (functional.normalize(x.double(), dim=-1) for x in (candidates_MH, private_NH))
    return torch.cat([(a_MH[at : at + 1024] @ b_NH.T).amax(1) >= cosine for at in range(0, len(a_MH), 1024)])


@final
@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Private rows, ready to be asked which candidates are copies of one. It stays where the rows are.

    A candidate is a copy where its words equal a private row's, where it shares a run of ``run`` words
    with one, where the Jaccard similarity of their shingles of three words reaches ``jaccard``, or
    where among ``window`` of its words in a row at least ``share`` of the shingles stand in one private
    row (of the row's own, if it has fewer). Rows and candidates shorter than ``run`` words are only
    found by equality and Jaccard similarity: shorter phrases are everyone's.

    Args:
        private: The rows.
        run: Words.
        jaccard: Similarity, above 0 and at most 1.
        window: Words, at least ``run``.
        share: Of the shingles, above 0 and at most 1.

    Raises:
        LichenError: if a number is out of range.

    >>> rows = NearDuplicates(["The zipper broke on the second day, and nobody answered my letters."])
    >>> rows.found(["Nice. The ZIPPER broke on the second day and nobody cares!", "It fits well."])
    ['a run of 8 words', '']
    """

    private: Sequence[str]
    _: KW_ONLY
    run: int = 8
    jaccard: float = 0.7
    window: int = 24
    share: float = 0.4
    _whole: frozenset[Shingle] = field(init=False, repr=False)
    _runs: frozenset[Shingle] = field(init=False, repr=False)
    _rows: dict[Shingle, list[int]] = field(init=False, repr=False)
    _sizes: list[int] = field(init=False, repr=False)
    _lengths: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (3 <= self.run <= self.window and 0 < self.jaccard <= 1 and 0 < self.share <= 1):
            raise LichenError(
                f"run {self.run}, window {self.window}, jaccard {self.jaccard}, share {self.share} do not fit",
                where="filters.copies",
                fix="use 3 <= run <= window, and jaccard and share above 0 and at most 1",
            )
        known = [words(text) for text in self.private]
        sets = [_runs(row, 3) for row in known]
        rows: defaultdict[Shingle, list[int]] = defaultdict(list)
        for at, some in enumerate(sets):
            for one in set(some):
                rows[one].append(at)
        put = object.__setattr__
        put(self, "_whole", frozenset(tuple(row) for row in known if row))
        put(self, "_runs", frozenset(one for row in known for one in _runs(row, self.run)))
        put(self, "_rows", dict(rows))
        put(self, "_sizes", [len(set(some)) for some in sets])
        put(self, "_lengths", [len(row) for row in known])

    def found(self, candidates: Iterable[str]) -> list[str]:
        """Why each candidate is a copy, without a word of the private row; empty where it is none."""
        return [self._reason(words(text)) for text in candidates]

    def _reason(self, text: list[str]) -> str:
        if tuple(text) in self._whole:
            return "equal words"
        if any(one in self._runs for one in _runs(text, self.run)):
            return f"a run of {self.run} words"
        some = _runs(text, 3)
        positions: defaultdict[int, list[int]] = defaultdict(list)
        for at, one in enumerate(some):
            for row in self._rows.get(one, ()):
                positions[row].append(at)
        size = len(set(some))
        for row, hits in positions.items():
            shared = len({some[at] for at in hits})
            if shared / (size + self._sizes[row] - shared) >= self.jaccard:
                return "nearly all shingles"
        for row, hits in positions.items():
            if min(len(text), self._lengths[row]) >= self.run and self._crowded(hits, row, len(some)):
                return f"many shingles within {self.window} words"
        return ""

    def _crowded(self, hits: list[int], row: int, shingles: int) -> bool:
        wide = min(self.window - 2, shingles)
        need = max(math.ceil(self.share * min(wide, self._lengths[row] - 2)), 2)
        # Hits rise: the need-th after this one tells whether a window that begins here holds enough.
        return any(hits[i + need - 1] - hits[i] < wide for i in range(len(hits) - need + 1))


def _runs(text: Sequence[str], size: int) -> list[Shingle]:
    return [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
