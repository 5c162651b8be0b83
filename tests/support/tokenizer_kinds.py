"""Small tokenizers of every kind that transformers loads, learned from a few sentences in a moment."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from support.chat_templates import MARKS

__all__ = ["KINDS", "tokenizer_of"]

TEXT = [
    "What is it that grows on the north side of a stone? The moss, of course, and the lichen beside it.",
    "Which one do you like? That one. Say yes or no thanks, and then ask me about the fox again.",
    "system user assistant model USER ASSISTANT Task Reply Q A: You help with moss. Be kind. Answer in one word.",
    "def f(x):\n    return x + 1\n\nprint(f(2))\n\n\nIt's 12,345 of them; isn't it?  Two  blanks, and a tab\there.",
    "Ein Fuß, drei Füße; naïve café; это лишайник; 苔は石の上に育つ 🌱🌱",
] * 3
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_SPLIT = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bpe(*, fallback: bool = False, ignore_merges: bool = False) -> tuple[Tokenizer, Any]:
    model = models.BPE(unk_token="<unk>", byte_fallback=fallback, ignore_merges=ignore_merges, fuse_unk=fallback)
    special = [*_SPECIAL.values(), *([f"<0x{i:02X}>" for i in range(256)] if fallback else [])]
    alphabet = [] if fallback else pre_tokenizers.ByteLevel.alphabet()
    return Tokenizer(model), trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )


def _byte_level(inner: Tokenizer, *, trim: bool) -> None:
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)


_MARK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def _made(kind: str) -> Tokenizer:
    if kind in ("gpt-2", "roberta"):
        inner, trainer = _bpe()
        _byte_level(inner, trim=kind == "roberta")
    elif kind == "llama-3":
        inner, trainer = _bpe(ignore_merges=True)
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.ByteLevel(trim_offsets=False)
    elif kind in ("llama-2-legacy", "llama-2", "gemma"):
        inner, trainer = _bpe(fallback=True)
        # Trained on marked words, and put together as the family does.
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        inner.train_from_iterator(TEXT, trainer)
        told = json.loads(inner.to_str())
        told["added_tokens"] = [one for one in told["added_tokens"] if not one["content"].startswith("<0x")]
        inner = Tokenizer.from_str(json.dumps(told))
        if kind == "llama-2-legacy":
            inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            inner.pre_tokenizer = None  # type: ignore[assignment]
        elif kind == "llama-2":
            inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            inner.normalizer = normalizers.Replace(" ", "▁")
            inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        strip = [] if kind == "gemma" else [decoders.Strip(" ", 1, 0)]
        inner.decoder = decoders.Sequence([*_MARK, *strip])
        return inner
    elif kind == "unigram":
        inner = Tokenizer(models.Unigram())
        collapse = normalizers.Replace(Regex(" {2,}"), " ")
        inner.normalizer = normalizers.Sequence([normalizers.NFKC(), collapse])
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        inner.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=320, special_tokens=[*_SPECIAL.values()], unk_token="<unk>", show_progress=False
        )
    else:
        inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.normalizer = normalizers.BertNormalizer()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=[*_SPECIAL.values()], show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    return inner


class Letters(PreTrainedTokenizer):  # transformers wants its tokenizers derived
    """A tokenizer written in Python, a token a letter: it gives no offsets."""

    def __init__(self, **special: Any) -> None:
        letters = sorted({*"".join(TEXT), *map(chr, range(32, 127)), "\n", "\t"})
        self.letters = {token: i for i, token in enumerate([*_SPECIAL.values(), *letters])}
        self.spelled = [*self.letters]
        super().__init__(**special)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.letters.get(token, self.letters["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self.spelled[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


KINDS = ("gpt-2", "roberta", "llama-3", "llama-2-legacy", "llama-2", "gemma", "unigram", "wordpiece", "letters")


@cache
def tokenizer_of(kind: str, *, template: str | None = None, wide: bool = False) -> Any:
    """A tokenizer of this kind that knows all marks; ``wide``: some take the blanks behind them, as Phi-3's do."""
    special: dict[str, Any] = dict(_SPECIAL)
    made: Any = Letters(**special)
    if kind != "letters":
        made = PreTrainedTokenizerFast(tokenizer_object=_made(kind), **special)
    speakers = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    marks = [AddedToken(m, special=True, normalized=False, rstrip=wide and m in speakers) for m in MARKS]
    made.add_tokens(marks, special_tokens=True)
    made.chat_template = template
    return made
