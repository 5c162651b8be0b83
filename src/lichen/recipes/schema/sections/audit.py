"""The ``audit`` section: canaries in training, by which a finished run can be measured.

References: those of :mod:`lichen.audit.one_run` and :mod:`lichen.audit.exposure`.
"""

from __future__ import annotations

from pydantic import Field

from lichen.recipes.schema.model import Section

__all__ = ["AuditConfig"]


class AuditConfig(Section):
    """Rows that were drawn to be found again: each is put into training by a secret coin, or left out."""

    canaries: int = Field(
        ge=10,
        le=100_000,
        description="drawn rows that are dealt out over the clients, each trained on or not by a secret coin; "
        "`lichen audit` guesses which",
        examples=[200],
    )
    scale: float = Field(
        default=1.0, gt=0, description="of rows of numbers: a canary's are normal ones, times this", allow_inf_nan=False
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="for tests only: canaries and coins follow from it; none: from a secret key",
    )
