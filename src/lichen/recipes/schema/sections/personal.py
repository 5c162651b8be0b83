"""The ``personal`` section: a model for each client beside the shared one, and what of it stays at home.

References: those of :mod:`lichen.clients.personal`, a method a file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lichen.recipes.schema.model import Positive, Section

__all__ = ["PersonalConfig"]


class PersonalConfig(Section):
    """Each client ends with a model of its own: the column `personal`, beside that of the shared model."""

    kind: Literal["finetune", "ditto", "apfl", "fedala", "feddpa", "fedalt", "norms", "ridge"] = Field(
        description="`finetune`: own steps from the best shared model, after the rounds; `ditto`: an own model beside "
        "the shared one in every round, which is pulled towards it; `apfl`: a mixture of own and shared tensors, its "
        "weight learned; `fedala`: each round starts between the client's last model and the shared one, number by "
        "number as is learned; `feddpa`: an own LoRA beside the shared one, each row weighing the two by how like the "
        "client's own rows it is; `fedalt`: an own LoRA that nothing replaces beside the frozen mean of all others', "
        "mixed by learned gates; `norms`: norms and biases stay with their client (FedBN); `ridge`, for oneshot: a "
        "head between everybody's rows and the client's own",
    )
    steps: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(16,),
        min_length=1,
        description="finetune, and feddpa after the rounds: own steps; of several, each "
        "client takes the number that is best on its validation rows",
    )
    lr_scale: float = Field(
        default=1.0,
        gt=0,
        description="finetune, and feddpa after the rounds: factor on the run's learning rate in own steps; few rows "
        "want smaller ones",
    )
    mu: float = Field(default=0.1, ge=0, description="ditto: how strong the pull is; 0: none, as in training alone")

    alpha: float = Field(default=0.5, ge=0, le=1, description="apfl: the own tensors' weight in the mixture at first")
    alpha_rate: float = Field(default=0.1, ge=0, description="apfl: the weight's learning rate; 0: it stays")
    layers: Positive = Field(default=1, description="fedala: top layers whose start is learned")
    start_steps: Positive = Field(default=8, description="fedala: steps that learn a round's start")
    start_rate: float = Field(default=1.0, ge=0, description="fedala: their learning rate; 0: the shared model")

    in_turns: bool = Field(
        default=False,
        description="feddpa: the own adapter is trained in every round (FedDPA-T); false: after the last, for `steps` "
        "(FedDPA-F)",
    )
    cap: float = Field(default=0.5, ge=0, le=1, description="feddpa: the most that the own adapter counts in a row")
    anchors: Annotated[int, Field(ge=0)] = Field(
        default=5,
        description="feddpa: own rows that a row is compared with, by the frozen model's hidden states; 0: none, and "
        "the own adapter counts as `cap` in all rows",
    )

    weight: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(0.0, 1.0, 4.0, 16.0),
        min_length=1,
        description="ridge: how much more own rows count than others' (mu); each client takes the best of them on its "
        "validation rows; 0: the shared head",
    )
    choose: bool = Field(
        default=False,
        description="one more column, `chosen`: each client takes what is best on its validation rows of base, alone, "
        "federated and personal, as far as they are columns",
    )
    others: Positive | None = Field(
        default=None,
        description="each client's own model is scored on so many test rows of other clients, too, and the shared "
        "model on the same; for simulation; none: it is not",
    )

    @property
    def afterwards(self) -> bool:
        """Whether own tensors are trained after the rounds."""
        return self.kind == "finetune" or (self.kind == "feddpa" and not self.in_turns)

    @property
    def in_rounds(self) -> bool:
        """Whether they are trained in every round."""
        return self.kind != "ridge" and not self.afterwards

    @field_validator("steps", mode="after")
    @classmethod
    def _rising(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if list(steps) != sorted(set(steps)):
            raise ValueError("personal.steps: must rise; name every number once, the smallest first")
        return steps
