"""One client's rows as arrays, ready to be cut into batches.

Legend: N rows, T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, final

import numpy as np

from lichen.core.errors import LichenError

__all__ = ["ArrayShard", "Shard", "TextShard", "pooled"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class TextShard:
    """Token rows of one client, each as long as it is.

    Attributes:
        input_ids: One integer array a row, at least one token each.
        labels: One array a row for ``lm`` (-100 where no loss is taken), or the class of every row
            ``(N,)`` for ``classify`` (-100 where unknown).
        kind: What the labels are.
        answer: Row of the shared answers for every row ``(N,)``, or None.
    """

    input_ids: tuple[np.ndarray, ...]
    _: KW_ONLY
    labels: tuple[np.ndarray, ...] | np.ndarray
    kind: Literal["lm", "classify"]
    answer: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("lm", "classify"):
            raise LichenError(f"unknown kind {self.kind!r}", where="shard", fix='use "lm" or "classify"')
        if len(self.labels) != len(self.input_ids):
            raise LichenError(f"{len(self.input_ids)} rows but {len(self.labels)} labels", where="shard")
        if isinstance(self.labels, tuple) != (self.kind == "lm"):
            raise LichenError("labels do not suit the kind", where="shard", fix="lm: a tuple of rows; classify: (N,)")
        if isinstance(self.labels, tuple) and any(
            len(a) != len(b) for a, b in zip(self.input_ids, self.labels, strict=True)
        ):
            raise LichenError("a row and its labels differ in length", where="shard")
        if any(len(row) == 0 for row in self.input_ids):
            raise LichenError("a row has no tokens", where="shard", fix="drop rows with empty text")
        _check_answer(self.answer, len(self.input_ids))

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.input_ids)

    @classmethod
    def of(
        cls, rows: Sequence[tuple[np.ndarray, np.ndarray]] | Sequence[tuple[np.ndarray, int]], *, kind: str
    ) -> TextShard:
        """A shard of what :func:`lichen.data.text.encode_lm` or ``encode_classify`` returns."""
        ids = tuple(row for row, _ in rows)
        if kind == "lm":
            return cls(ids, labels=tuple(np.asarray(label) for _, label in rows), kind="lm")
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
        if self.labels.shape != (len(self.x),):
            raise LichenError(f"{len(self.x)} rows but labels of shape {self.labels.shape}", where="shard")
        _check_answer(self.answer, len(self.x))

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.x)


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
        rows = tuple(row for s in texts for row in s.input_ids)
        if texts[0].kind == "lm":
            return TextShard(rows, labels=tuple(row for s in texts for row in s.labels), kind="lm", answer=answer)
        joined = np.concatenate([np.asarray(s.labels) for s in texts])
        return TextShard(rows, labels=joined, kind="classify", answer=answer)
    raise LichenError("shards are of different kinds, or there are none", where="shard", fix="pool equal kinds")
