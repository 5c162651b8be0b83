"""Opens the large model that a small tuned one steers, and refuses one whose logits mean other tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lichen.core.errors import LichenError
from lichen.data.sources.catalog import CATALOG, resolve_model
from lichen.data.sources.fetch import fetch_entry
from lichen.models.loading.load import causal_tokenizer, load_causal
from lichen.models.tokens.same_vocabulary import require_same_vocabulary

__all__ = ["open_big", "require_fit"]


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors about the model name the key that it stands in."""
    try:
        yield
    except LichenError as error:
        place = where if error.where == "model.name" else error.where
        raise LichenError(error.what, where=place, fix=error.fix) from None


def require_fit(name: str, tokenizer: Any, *, where: str, say: Callable[[str], None] = lambda _: None) -> None:
    """Refuse a model that has no logits of the small model's tokens; none of its weights are loaded.

    Args:
        name: Catalog name, folder or hub id.
        tokenizer: The small model's.
        where: The key that names it.
        say: Called with lines of progress, where it is fetched.

    Raises:
        LichenError: if it cannot be read, is no causal language model, or has another vocabulary.
    """
    if name in CATALOG:
        fetch_entry(name, say=say)
    with _named(where):
        other = causal_tokenizer(resolve_model(name))
    require_same_vocabulary(tokenizer, other, where=where)


def open_big(name: str, tokenizer: Any, *, where: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """The model, frozen.

    Args:
        name: Catalog name, folder or hub id.
        tokenizer: The small model's.
        where: The key that names it.
        dtype: Of its weights.
        device: Where it lies.

    Raises:
        LichenError: as :func:`require_fit`, or if its weights cannot be loaded.
    """
    with _named(where):
        model, other = load_causal(resolve_model(name), dtype=dtype, device=device)
    require_same_vocabulary(tokenizer, other, where=where)
    return model
