"""A small vocabulary of a student, made of the frequent tokens of public text.

The embeddings of a foundation model's whole vocabulary would be most of a small student's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from lichen.data.batches.rows import TextShard

__all__ = ["Frequent"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Frequent:
    """Old token numbers and their new ones.

    Attributes:
        words: The new number of each token that is kept.
        unknown: The new number of all others.
    """

    words: Mapping[int, int]
    unknown: int

    @classmethod
    def of(cls, shards: Sequence[TextShard], *, size: int, keep: Sequence[int], unknown: int) -> Frequent:
        """The ``size`` most frequent tokens, renumbered from ``len(keep)`` on; ``keep`` comes first.

        Args:
            shards: Rows of public text.
            size: Tokens in all.
            keep: Tokens that stay whatever their number, such as padding.
            unknown: One of them, which stands for every token that is left out.

        >>> rows = (np.array([7, 8, 8, 0], dtype=np.int32),)
        >>> Frequent.of([TextShard(rows, labels=rows, kind="lm")], size=2, keep=[0], unknown=0).words
        {0: 0, 8: 1}
        """
        counts: dict[int, int] = {}
        for shard in shards:
            for ids in shard.input_ids:
                for token in ids.tolist():
                    counts[token] = counts.get(token, 0) + 1
        ranked = sorted((t for t in counts if t not in set(keep)), key=lambda t: (-counts[t], t))
        words = {token: i for i, token in enumerate([*keep, *ranked[: size - len(keep)]])}
        return cls(words=words, unknown=words[unknown])

    def __len__(self) -> int:
        return len(self.words)

    def renumber(self, shard: TextShard) -> TextShard:
        """The shard in this vocabulary."""
        number_of = self.words
        ids = tuple(
            np.asarray([number_of.get(t, self.unknown) for t in row.tolist()], dtype=np.int32)
            for row in shard.input_ids
        )
        return replace(shard, input_ids=ids)
