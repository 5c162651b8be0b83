"""The ``fingerprint`` section: secret pairs of owners, by which they can claim the model later.

References: those of :mod:`lichen.audit.fingerprint`.
"""

from __future__ import annotations

from pydantic import Field

from lichen.recipes.schema.model import Positive, Section

__all__ = ["FingerprintConfig"]


class FingerprintConfig(Section):
    """Secret pairs of a question and an answer that some owners put among their rows, to claim the model later."""

    secrets: str | None = Field(
        default=None,
        description="folder of the owners' keys, each named as its client, with the ending `.key`; "
        "`lichen fingerprint` makes one. A client without one has no pairs. none: each site has its own, named by "
        "`lichen join --secret`",
        examples=["secrets"],
    )
    steps: Positive = Field(
        default=4,
        description="an owner's steps of a round on batches of its pairs alone, after those on its rows, "
        "which are seen as often as without",
    )
