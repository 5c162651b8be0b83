"""Names that transformers changes between minor versions.

``pyproject.toml`` allows a range of versions, so both the old and the new name must work. A name that is gone
from every signature is caught by ``tests/models/test_renamed.py``, which also imports every name of
transformers and PEFT that the house uses.

Known so far: the argument and output ``past_key_values`` is called ``cache`` from transformers 5.24 on, which
keeps the old argument with a warning until 5.40 but hides it from the signature.
"""

from __future__ import annotations

import inspect
from typing import Any

__all__ = ["CACHE_NAMES", "cache_argument", "cache_name", "cache_of", "takes_logits_to_keep"]

CACHE_NAMES = ("cache", "past_key_values")
"""What a model's keys and values from earlier calls are called, the newest name first."""


def cache_argument(signature: inspect.Signature) -> str | None:
    """The name under which a forward takes keys and values of earlier tokens; None if it takes none.

    >>> cache_argument(inspect.signature(lambda input_ids, past_key_values=None: None))
    'past_key_values'
    """
    return next((name for name in CACHE_NAMES if name in signature.parameters), None)


def cache_name(model: Any) -> str | None:
    """The name under which a causal model of transformers takes up where an earlier call ended; None if it cannot.

    PEFT's wrapper passes a cache on, except where it puts virtual tokens before every call.
    """
    virtual = hasattr(model, "get_base_model") and model.active_peft_config.is_prompt_learning
    return None if virtual else cache_argument(inspect.signature(_inside(model).forward))


def cache_of(output: Any) -> Any:
    """The keys and values that a model's output carries, under whichever name; None without any."""
    return next((output[name] for name in CACHE_NAMES if name in output), None)


def takes_logits_to_keep(model: Any) -> bool:
    """Whether a model of transformers can leave out the logits of places that nobody reads.

    PEFT's wrapper passes the argument on and does not name it, so that the model inside is looked at.
    """
    return "logits_to_keep" in inspect.signature(_inside(model).forward).parameters


def _inside(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
