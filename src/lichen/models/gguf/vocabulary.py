"""A tokenizer as GGUF holds it: tokens, their types, merges or scores, special tokens and the chat template.

Two kinds have a form that llama.cpp cuts in the same way: byte-level pairs whose first cut is one that llama.cpp knows
(``gpt2``), and pairs of marked words that fall back to bytes (``llama``). llama.cpp joins the latter by the scores of
tokens; the rank of the merge that makes a token, negated, is such a score.

References:
    Rico Sennrich, Barry Haddow and Alexandra Birch. "Neural Machine Translation of Rare Words with Subword Units." ACL
    2016. https://arxiv.org/abs/1508.07909
    Taku Kudo and John Richardson. "SentencePiece: A simple and language independent subword tokenizer and detokenizer
    for Neural Text Processing." EMNLP 2018. https://arxiv.org/abs/1808.06226

Legend: V tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.models.gguf.architectures import Value

__all__ = ["vocabulary_of"]


@final
class TokenType(IntEnum):
    """What a token is, by llama.cpp's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_WORDS}|\p{{N}}|{_REST}": "qwen2"}
"""Patterns that cut a text before its pairs are joined, and llama.cpp's names for them."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MARK = "▁"


def vocabulary_of(tokenizer: Any, size: int) -> dict[str, Value]:
    """What llama.cpp must know of a tokenizer, under GGUF's keys.

    Args:
        tokenizer: A fast tokenizer.
        size: V, rows of the model's embedding; those without a token are written as unused.

    Raises:
        LichenError: if GGUF has no form in which llama.cpp would cut texts as this tokenizer does.
    """
    about = _described(tokenizer)
    tokens = _tokens(tokenizer, size)
    types = _types(tokenizer, about, tokens)
    spelled = [_spelled(i, token, types[i]) for i, token in enumerate(tokens)]
    out: dict[str, Value]
    if about["model"].get("byte_fallback"):
        scores = _scores(about["model"], spelled, types)
        out = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default"}
        out |= {"tokenizer.ggml.tokens": spelled, "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types}
        out["tokenizer.ggml.add_space_prefix"] = _begins_with_space(about)
    else:
        out = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _cut_of(about)}
        out |= {"tokenizer.ggml.tokens": spelled, "tokenizer.ggml.token_type": types}
        out["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(about["model"])]
    kinds = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for ours, theirs in kinds.items():
        number = getattr(tokenizer, f"{ours}_token_id")
        if number is not None:
            out[f"tokenizer.ggml.{theirs}_token_id"] = int(number)
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    out["tokenizer.ggml.add_bos_token"] = whole == [tokenizer.bos_token_id, *plain] or _both(tokenizer, plain, whole)
    out["tokenizer.ggml.add_eos_token"] = whole == [*plain, tokenizer.eos_token_id] or _both(tokenizer, plain, whole)
    if isinstance(tokenizer.chat_template, str):
        out["tokenizer.chat_template"] = tokenizer.chat_template
    return out


def _spelled(number: int, token: str | None, kind: int) -> str:
    if token is None:
        return f"[PAD{number}]"
    return token.replace(_MARK, " ") if kind == TokenType.USER_DEFINED else token


def _both(tokenizer: Any, plain: Sequence[int], whole: Sequence[int]) -> bool:
    return list(whole) == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]


def _refused(what: str) -> LichenError:
    fix = (
        "use --merge; as GGUF there are byte-level pairs, cut as by GPT-2, SmolLM, Llama 3 or Qwen 2, and Llama's pairs"
    )
    return LichenError(f"the tokenizer has no GGUF form: {what}", where="--gguf", fix=fix)


def _described(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's own description of itself.

    Raises:
        LichenError: if it joins no pairs.
    """
    if not tokenizer.is_fast:
        raise _refused("it is written in Python")
    about: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = about["model"].get("type", "unknown")
    if kind != "BPE":
        raise _refused(f"it is of kind {kind}, which joins no pairs")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if about["model"].get(key):
            raise _refused(f"it sets {key}")
    return about


def _tokens(tokenizer: Any, size: int) -> list[str | None]:
    names: list[str | None] = [None] * size
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            raise LichenError(f"token {token!r} has no row in the model", where="--gguf", fix="use the run's tokenizer")
        names[number] = token
    return names


def _types(tokenizer: Any, about: Mapping[str, Any], tokens: Sequence[str | None]) -> list[int]:
    added = tokenizer.added_tokens_decoder
    bytewise = bool(about["model"].get("byte_fallback"))
    out = []
    for i, token in enumerate(tokens):
        if token is None:
            out.append(TokenType.UNUSED)
        elif bytewise and token == tokenizer.unk_token:
            out.append(TokenType.UNKNOWN)
        elif i in added:
            out.append(TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED)
        elif bytewise and _BYTE.fullmatch(token):
            out.append(TokenType.BYTE)
        else:
            out.append(TokenType.NORMAL)
    return [int(one) for one in out]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    for pair in pairs:
        if len(pair) != 2 or any(" " in part for part in pair):
            raise _refused(f"one of its merges is {pair!r}")
    return pairs  # type: ignore[return-value]  # of two, each


def _cut_of(about: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a text is cut before pairs are joined.

    Raises:
        LichenError: if it has none.
    """
    normalizer = about.get("normalizer") or {}
    if normalizer.get("type", "NFC") != "NFC":
        raise _refused(f"it rewrites texts first ({normalizer['type']})")
    steps = about.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type", "nothing") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel":
        raise _refused(f"it cuts texts by {' and '.join(kinds)}, and pairs are not of bytes")
    if steps[-1].get("add_prefix_space"):
        raise _refused("it puts a space before each text")
    whole = not steps[-1].get("use_regex", True)
    ignores = bool(about["model"].get("ignore_merges"))
    name = None
    if kinds == ["ByteLevel"] and not whole:
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and not whole and steps[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and whole and not steps[0].get("invert"):
        pattern = steps[0]["pattern"].get("Regex", "")
        alike = steps[0]["behavior"] == "Isolated"
        name = ("gpt-2" if pattern == _GPT2 else _CUTS.get(pattern)) if alike else None
    if name == "llama-bpe" and not ignores:
        return "dbrx"  # the same pattern, without a look for whole words first
    if name is None or (ignores and name != "llama-bpe"):
        raise _refused(f"llama.cpp has no name for how it cuts texts ({', '.join(kinds)})")
    return name


def _scores(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """A token's score: the later its merge, the lower; what no merge makes is lowest, and joined by none."""
    rank: dict[str, int] = {}
    for i, (one, other) in enumerate(_merges(model)):
        rank.setdefault(one + other, i)
    last = float(len(rank))
    ordinary = (int(TokenType.NORMAL),)
    return [
        -float(rank.get(token, last)) if kind in ordinary else 0.0 for token, kind in zip(tokens, types, strict=True)
    ]


def _begins_with_space(about: Mapping[str, Any]) -> bool:
    """Whether a text's first word is marked like any other.

    Raises:
        LichenError: if words are not marked as Llama's.
    """
    normalizer, cut = about.get("normalizer") or {}, about.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    marks = [step for step in steps if step.get("type") == "Replace" and step.get("content") == _MARK]
    puts = [step for step in steps if step.get("type") == "Prepend" and step.get("prepend") == _MARK]
    if len(marks) + len(puts) != len(steps):
        raise _refused(f"it rewrites texts first ({', '.join(step.get('type', '') for step in steps)})")
    if cut.get("type") == "Metaspace" and not steps and cut.get("replacement") == _MARK and not cut.get("split"):
        return cut.get("prepend_scheme") in ("first", "always")
    if marks and not cut:
        return bool(puts)
    raise _refused(f"it cuts texts by {cut.get('type', 'nothing')}")
