"""The rows of one client as arrays.

Token rows lie one after another in a flat array, with the place where each begins: a client is then a
stretch of an array that many clients share, and the array may be a file mapped into memory.

Legend: N rows, T tokens of all rows together, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, final, overload

import numpy as np

from lichen.core.errors import LichenError

__all__ = ["ArrayShard", "Compared", "Ragged", "Shard", "TextShard", "pooled"]


@final
class Ragged(Sequence[np.ndarray]):
    """Rows of unequal length in one flat array; a row is a view of it.

    Args:
        flat_T: The numbers of all rows.
        offset_N1: Where each row begins, and where the last one ends: ``(N + 1,)``, never falling. The
            first may lie anywhere, so that many stretches share one flat array.

    Raises:
        LichenError: if an offset falls or lies outside the flat array.

    >>> rows = Ragged(np.array([5, 6, 7]), np.array([0, 2, 3]))
    >>> [row.tolist() for row in rows], rows.length_N.tolist()
    ([[5, 6], [7]], [2, 1])
    """

    __slots__ = ("flat_T", "length_N", "offset_N1")

    def __init__(self, flat_T: np.ndarray, offset_N1: np.ndarray) -> None:
        # Slices of a plain array are quicker than those of a memmap, and keep the mapping alive as well.
        self.flat_T, self.offset_N1 = np.asarray(flat_T), np.asarray(offset_N1)
        self.length_N: np.ndarray = self.offset_N1[1:] - self.offset_N1[:-1]
        """Numbers of each row."""
        if not len(self.offset_N1) or self.offset_N1[0] < 0 or self.offset_N1[-1] > len(self.flat_T):
            raise LichenError("row offsets lie outside the rows", where="shard", fix="give one more than rows")
        if len(self.length_N) and self.length_N.min() < 0:
            raise LichenError("row offsets fall", where="shard", fix="sort them")

    @classmethod
    def of(cls, rows: Sequence[Any] | np.ndarray) -> Ragged:
        """Rows laid one after another; rows that lie so already are not copied."""
        if isinstance(rows, Ragged):
            return rows
        flat_T = np.concatenate([np.asarray(row) for row in rows]) if len(rows) else np.zeros(0, np.int32)
        offset_N1 = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offset_N1[1:])
        return cls(flat_T, offset_N1)

    def between(self, start: int, stop: int) -> Ragged:
        """Rows ``start`` to ``stop`` (left out), of the same flat array."""
        some = object.__new__(Ragged)  # part of what was checked: a roster cuts these by the thousand
        some.flat_T, some.offset_N1 = self.flat_T, self.offset_N1[start : stop + 1]
        some.length_N = self.length_N[start:stop]
        return some

    def cut(self, rows: Iterable[tuple[int, int]], width: int, *, into: dict[int, np.ndarray]) -> None:
        """Put the first ``width`` numbers of some rows into a dict; ``rows`` are pairs of (key, row)."""
        place, flat_T = self.offset_N1.item, self.flat_T
        for key, row in rows:
            start = place(row)
            into[key] = flat_T[start : min(place(row + 1), start + width)]

    def __len__(self) -> int:
        return len(self.length_N)

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, row: slice) -> Ragged: ...
    def __getitem__(self, row: int | slice) -> np.ndarray | Ragged:
        if isinstance(row, slice):
            start, stop, step = row.indices(len(self))
            near = step == 1 and start <= stop
            return self.between(start, stop) if near else Ragged.of([self[i] for i in range(start, stop, step)])
        at = range(len(self))[row]
        return self.flat_T[self.offset_N1[at] : self.offset_N1[at + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.flat_T[start:stop] for start, stop in pairwise(self.offset_N1.tolist()))


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compared:
    """What the rows of a shard are compared with, where preferences are learned.

    What is dear to make is made when it is asked for.

    Attributes:
        good_N: 1 where a row is good, 0 where it is bad, int64.
        second: Another answer to each row's prompt; None: there is none.
        reference: Gives ``(N, 2)`` float32, the log-probability of a row's answer and of its second one by the model
            that training begins from; 0 where there is no second. None: nobody has scored them.
    """

    good_N: np.ndarray
    second: Callable[[], TextShard] | None = None
    reference: Callable[[], np.ndarray] | None = None

    def between(self, start: int, stop: int) -> Compared:
        """Of rows ``start`` to ``stop`` (left out)."""
        second, reference = self.second, self.reference
        return Compared(
            good_N=self.good_N[start:stop],
            second=None if second is None else lambda: second().between(start, stop),
            reference=None if reference is None else lambda: reference()[start:stop],
        )

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        """Of the rows of several shards, one below the other."""
        seconds = [part.second for part in parts if part.second is not None]
        references = [part.reference for part in parts if part.reference is not None]
        if any(some and len(some) != len(parts) for some in (seconds, references)):
            raise LichenError("some shards have second answers or scores, and some do not", where="shard")

        def second() -> TextShard:
            every = pooled([one() for one in seconds])
            assert isinstance(every, TextShard)
            return every

        return cls(
            good_N=np.concatenate([part.good_N for part in parts]),
            second=cache(second) if seconds else None,
            reference=cache(lambda: np.concatenate([one() for one in references])) if references else None,
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class TextShard:
    """Token rows of one client, each as long as it is.

    Attributes:
        input_ids: Integer rows, at least one token each; any sequence of rows is taken, and kept as
            :class:`Ragged`.
        labels: One row of labels a row for ``lm`` (-100 where no loss is taken), kept as :class:`Ragged`
            too, or the class of every row ``(N,)`` for ``classify`` (-100 where unknown).
        kind: What the labels are.
        answer: Row of the shared answers for every row ``(N,)``, or None.
        compared: What the rows are compared with, where preferences are learned.
    """

    input_ids: Sequence[np.ndarray]
    _: KW_ONLY
    labels: Sequence[np.ndarray] | np.ndarray
    kind: Literal["lm", "classify"]
    answer: np.ndarray | None = None
    compared: Compared | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("lm", "classify"):
            raise LichenError(f"unknown kind {self.kind!r}", where="shard", fix='use "lm" or "classify"')
        if len(self.labels) != len(self.input_ids):
            raise LichenError(f"{len(self.input_ids)} rows but {len(self.labels)} labels", where="shard")
        if isinstance(self.labels, np.ndarray) != (self.kind == "classify"):
            raise LichenError("labels do not suit the kind", where="shard", fix="lm: rows of labels; classify: (N,)")
        object.__setattr__(self, "input_ids", Ragged.of(self.input_ids))
        if self.kind == "lm":
            object.__setattr__(self, "labels", Ragged.of(self.labels))
            if not np.array_equal(Ragged.of(self.labels).length_N, self.length_N):
                raise LichenError("a row and its labels differ in length", where="shard")
        if self.size and self.length_N.min() == 0:
            raise LichenError("a row has no tokens", where="shard", fix="drop rows with empty text")
        _check_answer(self.answer, len(self.input_ids))

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    @property
    def length_N(self) -> np.ndarray:
        """Tokens of every row."""
        return Ragged.of(self.input_ids).length_N

    @property
    def longest_N(self) -> np.ndarray:
        """Tokens of every row, or of its second answer where that is longer."""
        second = None if self.compared is None else self.compared.second
        return self.length_N if second is None else np.maximum(self.length_N, second().length_N)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, and of their second answers."""
        second = None if self.compared is None else self.compared.second
        return int(self.length_N.sum()) + (0 if second is None else int(second().length_N.sum()))

    def between(self, start: int, stop: int) -> TextShard:
        """Rows ``start`` to ``stop`` (left out) as a shard of their own; nothing is copied."""
        ids, labels = Ragged.of(self.input_ids), self.labels
        some = object.__new__(TextShard)  # part of what was checked
        put = object.__setattr__
        put(some, "input_ids", ids.between(start, stop))
        put(some, "kind", self.kind)
        put(some, "answer", None if self.answer is None else self.answer[start:stop])
        put(some, "compared", None if self.compared is None else self.compared.between(start, stop))
        cut = labels[start:stop] if isinstance(labels, np.ndarray) else Ragged.of(labels).between(start, stop)
        put(some, "labels", cut)
        return some

    @classmethod
    def of(
        cls, rows: Sequence[tuple[np.ndarray, np.ndarray]] | Sequence[tuple[np.ndarray, int]], *, kind: str
    ) -> TextShard:
        """A shard of what :func:`lichen.data.batches.text.encode_lm` or ``encode_classify`` returns."""
        ids = Ragged.of([row for row, _ in rows])
        if kind == "lm":
            return cls(ids, labels=Ragged(Ragged.of([label for _, label in rows]).flat_T, ids.offset_N1), kind="lm")
        return cls(ids, labels=np.array([label for _, label in rows], dtype=np.int64), kind="classify")


@final
@dataclass(frozen=True, slots=True, eq=False)
class ArrayShard:
    """Rows of one client without tokens, such as pictures.

    Attributes:
        x: ``(N, ...)`` float32.
        labels: ``(N,)`` class of every row, -100 where unknown.
        answer: Row of the shared answers for every row ``(N,)``, or None.
    """

    x: np.ndarray
    _: KW_ONLY
    labels: np.ndarray
    answer: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.labels.shape[:1] != (len(self.x),):
            raise LichenError(f"{len(self.x)} rows but labels of shape {self.labels.shape}", where="shard")
        _check_answer(self.answer, len(self.x))

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.x)

    def between(self, start: int, stop: int) -> ArrayShard:
        """Rows ``start`` to ``stop`` (left out) as a shard of their own; nothing is copied."""
        answer = None if self.answer is None else self.answer[start:stop]
        return ArrayShard(self.x[start:stop], labels=self.labels[start:stop], answer=answer)


Shard = TextShard | ArrayShard
"""What a client holds."""


def _check_answer(answer: np.ndarray | None, rows: int) -> None:
    if answer is not None and answer.shape != (rows,):
        raise LichenError(f"{rows} rows but answers of shape {answer.shape}", where="shard")


def pooled(shards: Mapping[int, Shard] | Sequence[Shard]) -> Shard:
    """All clients' rows in one shard, in client order: what training without federation would see.

    Raises:
        LichenError: if there are no shards, or they are of different kinds.
    """
    every = [shards[c] for c in sorted(shards)] if isinstance(shards, Mapping) else list(shards)
    answers = [s.answer for s in every if s.answer is not None]
    if answers and len(answers) != len(every):
        raise LichenError("some shards have answers and some do not", where="shard")
    answer = np.concatenate(answers) if answers else None
    texts = [s for s in every if isinstance(s, TextShard)]
    arrays = [s for s in every if isinstance(s, ArrayShard)]
    if arrays and not texts and len({s.x.shape[1:] for s in arrays}) == 1:
        return ArrayShard(
            np.concatenate([s.x for s in arrays]), labels=np.concatenate([s.labels for s in arrays]), answer=answer
        )
    if texts and not arrays and len({s.kind for s in texts}) == 1:
        rows = [row for s in texts for row in s.input_ids]
        if texts[0].kind == "lm":
            some = [s.compared for s in texts if s.compared is not None]
            compared = Compared.joined(some) if len(some) == len(texts) else None
            labels = [row for s in texts for row in s.labels]
            return TextShard(rows, labels=labels, kind="lm", answer=answer, compared=compared)
        joined = np.concatenate([np.asarray(s.labels) for s in texts])
        return TextShard(rows, labels=joined, kind="classify", answer=answer)
    raise LichenError("shards are of different kinds, or there are none", where="shard", fix="pool equal kinds")
