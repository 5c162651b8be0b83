"""The ``offsite`` section: the model that an emulator stands for, where the machine of a simulation has it.

References:
    Guangxuan Xiao, Ji Lin and Song Han. "Offsite-Tuning: Transfer Learning without Full Model." 2023.
    https://arxiv.org/abs/2302.04870
"""

from __future__ import annotations

from pydantic import Field

from lichen.recipes.schema.model import Section

__all__ = ["OffsiteConfig"]


class OffsiteConfig(Section):
    """The whole model behind the emulator in `model.name`, which its owner has; for research on one machine."""

    model: str = Field(
        description="the model that the emulator was made of: catalog name, local folder or hub id. No client sees it; "
        "it gives the columns base, plugged and full",
        examples=["smollm2-135m"],
    )
