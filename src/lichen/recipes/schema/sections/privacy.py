"""The ``privacy`` section: what noise protects, and how much of it may be spent.

References: those of :mod:`lichen.algorithms.private_average` and :mod:`lichen.transforms.privacy`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lichen.recipes.schema.model import Section

__all__ = ["PrivacyConfig"]


class PrivacyConfig(Section):
    """Differential privacy in training: clipped changes, secret sampling and noise, and a budget that is kept."""

    unit: Literal["client", "row"] = Field(
        default="client",
        description="what one change of is hidden: `client`, a client with all its rows; `row`, a row of a client",
    )
    epsilon: float | None = Field(
        default=None,
        gt=0,
        description="what all rounds may spend; without sigma the noise is chosen for it. None: whatever sigma costs",
    )
    sigma: float | None = Field(
        default=None,
        ge=0,
        description="noise in a round's sum, or a step's, in units of clip; none: the least that keeps epsilon",
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="chance that epsilon does not hold; none: 1 / (N ln N) for N clients, or rows of the largest one",
    )
    clip: float = Field(
        gt=0, description="norm that each client's change, or each row's gradient, is cut to, over all tensors together"
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="for tests only: coins and noise follow from it, and nothing is private; none: from a secret key",
    )

    @model_validator(mode="after")
    def _some_noise(self) -> PrivacyConfig:
        if self.epsilon is None and self.sigma is None:
            raise ValueError("privacy.epsilon: neither it nor privacy.sigma says how much noise there is; set one")
        return self
