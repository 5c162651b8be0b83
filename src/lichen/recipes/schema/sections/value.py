"""The ``value`` section: what each client's messages contributed, and how that is found.

References: those of :mod:`lichen.server.value.game` and :mod:`lichen.server.value.coalitions`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lichen.recipes.schema.model import Positive, Section

__all__ = ["ValueConfig"]


class ValueConfig(Section):
    """What each client contributed to the loss, round by round, for `lichen report` and `lichen pay`."""

    kind: Literal["exact", "gtg", "first", "loo"] = Field(
        description="`exact`: Shapley values from every coalition of a round's clients, 12 at most; `gtg`: from "
        "coalitions along guided walks; `first`: from one gradient, for small steps; `loo`: what the round would lose "
        "without each. All need the single messages of a round; under masks there is `first`, which each client finds "
        "for itself"
    )
    of: Literal["cohort", "coalition"] = Field(
        default="cohort",
        description="`cohort`: a client outside a coalition counts as having sent no change; `coalition`: as not "
        "having been there, so that the weights of the others grow",
    )
    rows: Literal["public", "valid"] = Field(
        default="valid",
        description="rows whose loss is shared out: `valid`, those that clients validate on; `public`, the server's "
        "own of data.public.labelled, which no client sees",
    )
    every: Positive = Field(default=1, description="rounds from one that is valued to the next")
