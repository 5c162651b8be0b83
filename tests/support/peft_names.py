"""A model whose backbone also takes keys and values under the name that PEFT knows."""

from __future__ import annotations

import inspect
from typing import Any

from lichen.models.renamed import cache_argument


def with_peft_names(model: Any) -> Any:
    """The model, its backbone also taking ``past_key_values``; the model as it is where it does already.

    PEFT 0.21 asks a classifier's backbone for that name, finds ``cache`` with transformers 5.24, and refuses a prefix,
    though its own formula has not changed.
    """
    backbone = model.base_model
    forward, signature = backbone.forward, inspect.signature(backbone.forward)
    name = cache_argument(signature)
    if name in (None, "past_key_values"):
        return model

    def old_name(*inputs: Any, past_key_values: Any = None, **named: Any) -> Any:
        more = {} if past_key_values is None else {str(name): past_key_values}
        return forward(*inputs, **{**named, **more})

    known = [p.replace(name="past_key_values") if p.name == name else p for p in signature.parameters.values()]
    old_name.__signature__ = signature.replace(parameters=known)  # type: ignore[attr-defined]
    backbone.forward = old_name
    return model
