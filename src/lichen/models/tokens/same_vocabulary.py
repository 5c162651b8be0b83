"""Holds two tokenizers against each other: only of one vocabulary may logits be added.

Sizes say little: two vocabularies of one size may number other tokens, and one vocabulary may lie under output layers
of unequal size, which are padded. What counts is which token each number means, and how words are cut into tokens.
"""

from __future__ import annotations

import json
from typing import Any

from lichen.core.errors import LichenError

__all__ = ["require_same_vocabulary"]


def require_same_vocabulary(small: Any, big: Any, *, where: str) -> None:
    """Refuse two tokenizers of which a number means two things, or that cut words in two ways.

    Args:
        small: The tokenizer by which rows were encoded.
        big: That of the model whose logits are to be added.
        where: What names the second model, for errors.

    Raises:
        LichenError: naming the first token that differs.
    """
    ours, theirs = small.get_vocab(), big.get_vocab()
    fix = "name a model of the same family, with the same tokenizer"
    if ours != theirs:
        odd = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        first = min(
            odd, key=lambda token: (min(x for x in (ours.get(token), theirs.get(token)) if x is not None), token)
        )
        there, here = (
            "missing" if number is None else f"number {number}" for number in (theirs.get(first), ours.get(first))
        )
        raise LichenError(
            f"has another vocabulary than the small model: {first!r} is {there} in it, and {here} in the small one",
            where=where,
            fix=fix,
        )
    if _merges(small) != _merges(big):
        raise LichenError("cuts words into other tokens than the small model does", where=where, fix=fix)


def _merges(tokenizer: Any) -> Any:
    """How a fast tokenizer joins pieces to tokens; None where it joins none, or does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())["model"].get("merges")
