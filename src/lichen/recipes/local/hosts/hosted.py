"""A model of transformers whose logits are made elsewhere, so that the library's own sampling writes with them.

Legend: T tokens so far, V tokens of a vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lichen.models.loading.load import read_config
from lichen.recipes.local.next_logits import NextLogits

__all__ = ["hosted"]


def hosted(source: str | Path, logits: NextLogits) -> Any:
    """What has ``generate`` and no weights.

    Args:
        source: Folder or hub id of the model, whose configuration says how a text ends.
        logits: Gives the logits of the next token, ``(V,)``.
    """
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    @final
    class Hosted(PreTrainedModel, GenerationMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
        """Asks for logits in place of computing them."""

        _supports_sdpa = True

        @property
        def device(self) -> torch.device:
            """Where texts lie: there is no weight that could tell."""
            return torch.device("cpu")

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **named: Any) -> CausalLMOutput:
            """The logits of the next token, ``(1, 1, V)``."""
            del attention_mask, named
            return CausalLMOutput(logits=logits(input_ids[0].tolist())[None, None])

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **named: Any
        ) -> dict[str, Any]:
            """The whole text, at each token; a mask of one text hides nothing."""
            del attention_mask, named
            return {"input_ids": input_ids}

    config = read_config(source)
    model = Hosted(config)
    try:
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    except OSError:  # older folders have none beside their configuration
        model.generation_config = GenerationConfig.from_model_config(config)
    model.generation_config.use_cache = False
    return model
