"""The ``privacy`` section: what noise protects and how much of it may be spent, and whether masks hide messages.

References: those of :mod:`lichen.algorithms.private_average`, :mod:`lichen.transforms.privacy` and
:mod:`lichen.clients.masking.masked`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lichen.recipes.schema.model import Section

__all__ = ["PrivacyConfig"]


class PrivacyConfig(Section):
    """Clipped changes, secret sampling and noise, and a budget that is kept; sums that are all the server sees."""

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
    clip: float | None = Field(
        default=None,
        gt=0,
        description="norm that each client's change, or each row's gradient, is cut to, over all tensors together; "
        "none: under masks alone, numbers below 4,096",
    )
    secure: bool = Field(
        default=False,
        description="clients mask what they send, and the server learns the sum of a round and nothing else",
    )
    dropped: float = Field(
        default=0.3,
        ge=0,
        lt=0.5,
        description="secure: share of a round's clients that may fall silent in the middle of it",
    )
    colluding: float = Field(
        default=0.2,
        ge=0,
        lt=0.5,
        description="secure: share of clients that may tell the server all they see",
    )
    stage_seconds: float | None = Field(
        default=None,
        gt=0,
        description="secure: how long a stage of a round is waited for; none: until all have spoken or are gone",
    )
    dropout: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = Field(
        default=None,
        min_length=4,
        max_length=4,
        description="secure, for simulation: chance that a client falls silent in each of the four stages",
        examples=[[0.0, 0.0, 0.3, 0.0]],
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=2**31,
        description="for tests only: coins and noise follow from it, and nothing is private; none: from a secret key",
    )

    @property
    def noised(self) -> bool:
        """Noise hides somebody."""
        return self.epsilon is not None or self.sigma is not None

    @property
    def bound(self) -> float:
        """The clip, which noise cannot do without."""
        assert self.clip is not None
        return self.clip

    @model_validator(mode="after")
    def _some_noise(self) -> PrivacyConfig:
        if not self.noised and not self.secure:
            raise ValueError("privacy.epsilon: neither it nor privacy.sigma says how much noise there is; set one")
        if self.noised and self.clip is None:
            raise ValueError("privacy.clip: noise needs a bound on what it hides; set it, such as 1.0")
        for key in ("dropped", "colluding", "stage_seconds", "dropout"):
            if not self.secure and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"privacy.{key}: only masks read it; set privacy.secure: true, or remove it")
        for key in ("unit", "delta", "seed"):
            if not self.noised and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"privacy.{key}: only noise reads it; set privacy.epsilon or privacy.sigma, or remove it"
                )
        return self
