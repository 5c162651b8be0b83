"""The ``split`` section: clients hold the two ends of a model, and the server the middle.

References: those of :mod:`lichen.clients.splitting.split_train`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lichen.recipes.schema.model import Positive, Section
from lichen.transforms.codec_words import CHANGE, token_fault

__all__ = ["SplitConfig"]


class SplitEndsConfig(Section):
    """What a client holds, beside the embeddings, the norm and the head."""

    first: tuple[Positive, ...] = Field(
        default=(2,),
        min_length=1,
        description="blocks before the first cut; of several numbers each client has one, "
        "dealt out in turns as federation.ranks are, or with federation.memory the most that fit",
    )
    last: tuple[Positive, ...] = Field(
        default=(1,), min_length=1, description="blocks after the second cut, in the same way"
    )

    @property
    def several(self) -> bool:
        """Whether clients hold unequally many blocks."""
        return len(set(self.first)) > 1 or len(set(self.last)) > 1


class SplitConfig(Section):
    """Clients hold the first and the last blocks, the server holds the middle and trains its adapter."""

    client: SplitEndsConfig = Field(default=SplitEndsConfig(), description="what a client holds")
    kind: Literal["v1", "v2"] = Field(
        default="v1",
        description="`v1`: the server has a copy of the middle's adapter for each client, and after "
        "federation.local_steps (the sync of SplitLoRA) they are averaged with the clients' ends (SplitFed v1, "
        "SplitLoRA); `v2`: one copy, clients take turns with it (SplitFed v2)",
    )
    local_head: bool = Field(
        default=False,
        description="the first blocks learn from the client's own last blocks, put right above the first cut, and wait "
        "for no gradient: one exchange a step in place of two, three crossings in place of four",
    )
    code: tuple[str, ...] = Field(
        default=(),
        description="codecs of hidden states and gradients at both cuts, up and down, token by token: `bf16`, `int8`, "
        "`int4`, `topk:64/256` …; none: as they are. `change` before them: hidden states of a row cross whole at its "
        "first visit, and later as the coded change since the last one, which both sides remember (AQ-SGD)",
    )
    noise: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of Gaussian noise on what goes up, relative to the norm of a token's numbers",
    )

    @model_validator(mode="after")
    def _known_words(self) -> SplitConfig:
        words = self.code[1:] if self.code[:1] == (CHANGE,) else self.code
        if CHANGE in words or (self.code and not words):
            raise ValueError("split.code: change stands first and says what is coded by the words after it")
        if fault := token_fault(words):
            raise ValueError(f"split.code: {fault}")
        return self
