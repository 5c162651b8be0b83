"""The ``personal`` section: a model for each client beside the shared one, and what of it stays at home.

References: those of :mod:`lichen.clients.personal`, a method a file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lichen.recipes.schema.model import Section

__all__ = ["PersonalConfig"]

PersonalKind = Literal["finetune", "ditto"]


class PersonalConfig(Section):
    """Each client ends with a model of its own: the column `personal`, beside that of the shared model."""

    kind: PersonalKind = Field(
        description="`finetune`: own steps from the best shared model, after the rounds; `ditto`: an own model beside "
        "the shared one in every round, which is pulled towards it",
    )
    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(16,),
        min_length=1,
        description="finetune: own steps, at the run's learning rate; of several, each client takes the number that is "
        "best on its validation rows",
    )
    mu: float = Field(default=0.1, ge=0, description="ditto: how strong the pull is; 0: none, as in training alone")

    @field_validator("steps", mode="after")
    @classmethod
    def _rising(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError("personal.steps: must rise; name every number once, the smallest first")
        return steps
