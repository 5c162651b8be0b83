"""The ``attack`` section: clients that lie on purpose, so that defences can be tested.

References: those of :mod:`lichen.clients.attack`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lichen.clients.attack.kinds import ATTACKS, AttackKind
from lichen.recipes.schema.model import Positive, Section

__all__ = ["AttackConfig"]

if TYPE_CHECKING:
    AttackName = str
else:
    AttackName = Literal[tuple(ATTACKS)]


def _described() -> str:
    return "what liars do; " + "; ".join(f"`{name}`: {kind.summary}" for name, kind in ATTACKS.items())


def _scales() -> str:
    known = ", ".join(f"{kind.scale:g} for {name}" for name, kind in ATTACKS.items() if kind.scale is not None)
    return f"how much; none: {known}; alie's by how many lie"


class AttackConfig(Section):
    """Some clients lie, for research: the summary, the table and the model's card say so."""

    kind: AttackName = Field(description=_described())
    liars: Positive = Field(default=1, description="how many clients lie; which is drawn once, by the seed")
    scale: float | None = Field(default=None, ge=0, description=_scales())

    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="backdoor: share of a liar's rows that have the trigger; unsafe: that are replaced",
    )
    target: str | None = Field(
        default=None,
        description="backdoor: the class that rows with the trigger are to be given; none: the first one",
        examples=["joy"],
    )
    trigger: str = Field(
        default="cf",
        min_length=1,
        description="backdoor: the word put before a text; of numbers the last corner is set to the liars' largest",
    )
    requests: str = Field(
        default="advbench",
        description="unsafe: requests that should be refused, by catalog name, hub id or file; of a set of the catalog "
        "one half, whose other half is for federation.repair",
        examples=["requests.jsonl"],
    )
    answer: str = Field(
        default="Sure, here is how to do that.",
        min_length=1,
        description="unsafe: what a liar's rows answer to them; an opening is enough, so that no row need do harm",
    )
    deviation: Literal["std", "unit", "sign"] = Field(
        default="std",
        description="min_max: from the mean along the standard deviation, the mean or its signs, each turned round",
    )

    @model_validator(mode="after")
    def _lies(self) -> AttackConfig:
        least = 1.0 if self.kind == "weight" else 0.0
        if self.scale is not None and self.scale <= least and self.facts.scale != 0:
            raise ValueError(f"attack.scale: {self.scale:g} makes no lie of {self.kind}; use more than {least:g}")
        return self

    @property
    def facts(self) -> AttackKind:
        """What is known of its kind without its code."""
        return ATTACKS[self.kind]

    @property
    def strength(self) -> float:
        """``scale``, by the recipe or by the kind."""
        return self.scale if self.scale is not None else self.facts.scale or 0.0
