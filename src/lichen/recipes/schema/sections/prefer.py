"""The ``prefer`` section: by which loss preferences are learned, and which rows are good.

References: those of :mod:`lichen.models.preference.losses`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lichen.models.preference.kinds import PREFERENCES, PreferenceKind
from lichen.recipes.schema.model import Section

__all__ = ["PreferConfig"]

NonNegative = Annotated[int, Field(ge=0)]


class PreferConfig(Section):
    """Which of two answers is better, or which rows are good, and how that is learned."""

    kind: Literal["dpo", "kto", "orpo", "simpo", "spin", "sft"] = Field(
        description="`dpo`: from pairs, held against the model that training begins from; `kto`: from rows that are "
        "good or bad; `orpo`: from pairs, beside learning the better answer; `simpo`: from pairs, by the mean "
        "log-probability of a token; `spin`: DPO with rows as they are as the better and the model's own answers, "
        "written once at the client, as the worse ones; `sft`: the better answers or good rows alone, which the others "
        "are compared with"
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        description="how sharply answers are told apart; orpo: the weight of the odds (its lambda); "
        "none: 2 for simpo, else 0.1",
    )
    gamma: float = Field(default=1.0, ge=0, description="simpo: the margin")
    good: float | None = Field(
        default=None,
        description="rows with a rating: from which one on they are good; none: true, or 1",
        examples=[7.0],
    )
    bad: float | None = Field(
        default=None,
        description="rows with a rating: up to which one they are bad; none: false, or 0; rows between stay out",
        examples=[4.0],
    )
    min_good: NonNegative = Field(default=0, description="rows with a rating: clients with fewer good ones stay out")
    min_bad: NonNegative = Field(default=0, description="rows with a rating: clients with fewer bad ones stay out")
    good_weight: float = Field(default=1.0, gt=0, description="kto: how much a good row counts")
    bad_weight: float = Field(
        default=1.0,
        gt=0,
        description="kto: how much a bad row counts; its paper wants the good rows together to weigh "
        "1 to 4/3 of the bad ones",
    )

    own_answers: bool = Field(
        default=False, description="orpo and simpo: as spin, hold rows against the model's own answers"
    )
    temperature: float = Field(
        default=1.0, ge=0, description="own answers: at which they are drawn; 0: the likeliest token each time"
    )

    @model_validator(mode="after")
    def _bounds(self) -> PreferConfig:
        if (self.good is None) != (self.bad is None):
            alone = "good" if self.bad is None else "bad"
            raise ValueError(f"prefer: {alone} is set alone; set both bounds, or neither for ratings of true and false")
        if self.good is not None and self.bad is not None and self.bad >= self.good:
            raise ValueError("prefer: bad is not below good, so that a row would be both; lower prefer.bad")
        return self

    @property
    def facts(self) -> PreferenceKind:
        """What the kind is."""
        return PREFERENCES[self.kind]

    @property
    def sharpness(self) -> float:
        """β as it is used."""
        return self.facts.beta if self.beta is None else self.beta

    @property
    def writes_answers(self) -> bool:
        """The model's own answers stand where rows have no rejected one."""
        return self.kind == "spin" or self.own_answers
