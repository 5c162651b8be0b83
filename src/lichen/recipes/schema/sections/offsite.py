"""The ``offsite`` section: the model that an emulator stands for, where the machine of a simulation has it.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

from pydantic import Field

from lichen.recipes.schema.model import Positive, Section

__all__ = ["OffsiteConfig", "RealignConfig"]


class RealignConfig(Section):
    """The owner aligns the emulator's middle with the model, whose ends have moved, and sends a patch of it."""

    every: Positive = Field(default=2, description="rounds between two alignments")
    steps: Positive = Field(default=20, description="steps of each, of four rows")
    public: str = Field(description="text that anybody may see: catalog name, file or folder", examples=["sotu"])
    rank: Positive = Field(default=8, description="of the patch of each linear layer of the middle, sent in each job")
    lr: float = Field(default=1e-3, gt=0, lt=1, description="learning rate")


class OffsiteConfig(Section):
    """The whole model behind the emulator in `model.name`, which its owner has; for research on one machine."""

    model: str = Field(
        description="the model that the emulator was made of: catalog name, local folder or hub id. No client sees it; "
        "it gives the columns base, plugged and full",
        examples=["smollm2-135m"],
    )
    realign: RealignConfig | None = Field(
        default=None, description="FedBiOT: its owner aligns the emulator between rounds; none: it stays as it is"
    )
