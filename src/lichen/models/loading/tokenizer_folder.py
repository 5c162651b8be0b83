"""Checks the tokenizer of a model folder against the model's embedding.

Without its files transformers makes some tokenizers up, of special tokens and nothing else, and a tokenizer may
give ids for which the model has no row: both would only show in what is learned, or in the middle of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.models.loading.model_folder import plainly

__all__ = ["read_tokenizer"]

_PROBE = "Hello, 1 world."


def read_tokenizer(source: str | Path, model: Any) -> Any:
    """The tokenizer of a model, whose pad token may be its end token.

    A special token beyond the embedding that no text of its own calls for is left out: models cut down from larger
    ones carry such, for pictures or sound.

    Args:
        source: Folder or hub id.
        model: What its ids are for.

    Raises:
        LichenError: if it cannot be read, knows no words, has no token to pad with, or ids beyond the embedding.
    """
    from transformers import AutoTokenizer

    folder = Path(str(source)).expanduser()
    fix = "put its tokenizer files there"
    with plainly(f"cannot read a tokenizer at {source}", where="model.name", fix=fix):
        tokenizer = AutoTokenizer.from_pretrained(folder if folder.is_dir() else str(source), trust_remote_code=False)
        ids = dict(tokenizer.get_vocab())
    if not ids.keys() - set(tokenizer.all_special_tokens):
        raise LichenError(f"the tokenizer of {source} has no words", where="model.name", fix=fix)
    rows = int(model.get_input_embeddings().weight.shape[0])
    beyond = sorted(token for token, number in ids.items() if number >= rows)
    if beyond and not _leave_out(tokenizer, beyond):
        raise LichenError(
            f"the tokenizer of {source} has ids up to {max(ids.values()):,}, its model {rows:,} embeddings; "
            f"the first token without one is {min(beyond, key=ids.__getitem__)!r}",
            where="model.name",
            fix="put the model's own tokenizer there, or save it after model.resize_token_embeddings(len(tokenizer))",
        )
    with plainly(f"the tokenizer of {source} cannot read {_PROBE!r}", where="model.name", fix=fix):
        tokenizer(_PROBE)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise LichenError(
                f"the tokenizer of {source} has no pad token",
                where="model.name",
                fix='set "pad_token" in its tokenizer_config.json, then save it again',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _leave_out(tokenizer: Any, beyond: list[str]) -> bool:
    """Take special tokens out that have no embedding; False where one is a word, or is used to mark texts."""
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    used = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if any(t not in added or not added[t].special or t in used or t in template for t in beyond):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["content"] not in beyond]
    words = state["model"].get("vocab")
    if isinstance(words, dict):
        state["model"]["vocab"] = {word: number for word, number in words.items() if word not in beyond}
    with plainly("cannot leave out tokens without an embedding", where="model.name", fix="save the tokenizer again"):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return not any(token in tokenizer.get_vocab() for token in beyond)
