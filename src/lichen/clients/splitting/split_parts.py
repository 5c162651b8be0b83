"""The pieces of a split model: what clients of each cut hold, and what their server holds for them.

Legend: H width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from lichen.clients.splitting.ends import Cut, Ends
from lichen.models.pieces.piece_cohort import PieceCohort

__all__ = ["SplitParts"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SplitParts:
    """The pieces of a split model.

    Attributes:
        cuts: Dealt out to clients in turns.
        ends: What clients of a cut hold.
        middles: What the server holds for them.
        width: H, numbers of a hidden state.
        dtype_bytes: Bytes of one of them.
    """

    cuts: tuple[Cut, ...]
    ends: Mapping[Cut, Ends]
    middles: Mapping[Cut, PieceCohort]
    width: int
    dtype_bytes: int

    def cut_of(self, client: int) -> Cut:
        """A client's cut."""
        return self.cuts[client % len(self.cuts)]

    def ends_of(self, client: int) -> Ends:
        """What a client holds."""
        return self.ends[self.cut_of(client)]
