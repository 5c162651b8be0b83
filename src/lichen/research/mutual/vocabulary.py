"""Maps tokens between vocabularies by edit distance of their strings.

Research: no recipe and no public name reaches this module.

Two language models can only hear each other's next-token probabilities if every token of one can be said
in the other's vocabulary. Tokens are compared as the text they stand for: the sign for a space of
byte-level BPE, the underline of SentencePiece and tokens for single bytes are all undone first. A token
becomes the other vocabulary's token of the same text, where there is one, else the nearest by minimum edit
distance; ties go to the lowest number, which in a BPE vocabulary is the more frequent token. Special tokens
are no text: they map to the other's token of the same role, or to nothing.

References:
    Fanqi Wan, Xinting Huang, Deng Cai, Xiaojun Quan, Wei Bi and Shuming Shi. "Knowledge Fusion of Large
    Language Models." ICLR 2024. https://arxiv.org/abs/2401.10491
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224

Legend: A, B strings of either side, I, J characters of the longest, V tokens of a vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, final

import numpy as np

__all__ = ["Translation", "Vocabulary", "edit_distances"]

_ROLES = ("bos", "eos", "pad", "unk")
_SPACE, _UNDERLINE = "\u0120", "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_signs() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for: printable ones for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _text(data: bytes) -> str:
    # Part of a character is kept byte by byte, the same way for every kind of vocabulary.
    return data.decode("utf-8", errors="surrogateescape")


@final
@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a tokenizer as text.

    Args:
        strings: The text of every token by number; "" for numbers without a token and for special tokens.
        special: Number of the token of each role (``bos``, ``eos``, ``pad``, ``unk``); other special
            tokens go by their own name.

    Attributes:
        digest: Equal for equal vocabularies, and only for these; 12 hex digits.

    >>> Vocabulary(("a", " the"), special={}).digest == Vocabulary((" the", "a"), special={}).digest
    False
    """

    strings: tuple[str, ...]
    _: KW_ONLY
    special: Mapping[str, int] = field(default_factory=dict)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        canonical = json.dumps([self.strings, sorted(self.special.items())])
        object.__setattr__(self, "digest", hashlib.sha256(canonical.encode()).hexdigest()[:12])

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a transformers tokenizer: byte-level BPE, SentencePiece, or plain words."""
        numbers: dict[str, int] = tokenizer.get_vocab()
        special = {str(name): numbers[name] for name in tokenizer.all_special_tokens if name in numbers}
        out = set(special.values())
        for role in _ROLES:
            number = getattr(tokenizer, f"{role}_token_id", None)
            if number is not None:
                special[role] = int(number)
        byte_level = sum(name.startswith(_SPACE) for name in numbers)
        pieces = sum(name.startswith(_UNDERLINE) for name in numbers)
        signs = _byte_signs() if byte_level > pieces else {}
        strings = [""] * (max(numbers.values(), default=-1) + 1)
        for name, number in numbers.items():
            if number not in out:
                strings[number] = _plain(name, signs, pieces=pieces > byte_level)
        return cls(tuple(strings), special=special)

    @property
    def size(self) -> int:
        """V."""
        return len(self.strings)

    def read(self, ids: Iterable[int]) -> list[str]:
        """The text of each token."""
        return [self.strings[i] if 0 <= i < len(self.strings) else "" for i in ids]


def _plain(name: str, signs: Mapping[str, int], *, pieces: bool) -> str:
    if signs:
        # Tokens added by hand are written as they are, and may hold any character.
        return _text(bytes(signs[c] for c in name)) if all(c in signs for c in name) else name
    if not pieces:
        return name
    byte = _BYTE.fullmatch(name)
    return _text(bytes([int(byte[1], 16)])) if byte else name.replace(_UNDERLINE, " ")


_Coded = tuple[np.ndarray, np.ndarray]
"""Characters as numbers, ``(A, I)`` int32, and the strings' lengths ``(A,)``."""


def _coded(words: Sequence[str], fill: int) -> _Coded:
    length_A = np.array([len(word) for word in words], np.int64)
    code_AI = np.full((len(words), int(length_A.max(initial=0))), fill, np.int32)
    for row, word in enumerate(words):
        code_AI[row, : len(word)] = [ord(c) for c in word]
    return code_AI, length_A


def edit_distances(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """``(A, B)`` int16: fewest characters to insert, delete or replace, for every pair.

    One row of the dynamic programme is made for all pairs at once.

    >>> edit_distances(["kitten", ""], ["sitting", "kitten"]).tolist()
    [[3, 0], [7, 6]]
    """
    return _distances(_coded(a, -1), _coded(b, -2))


def _distances(a: _Coded, b: _Coded) -> np.ndarray:
    (a_AI, length_A), (b_BJ, length_B) = a, b
    pairs = len(a_AI), len(b_BJ)
    step_J = np.arange(b_BJ.shape[1] + 1, dtype=np.int16)[:, None, None]
    row_JAB = np.broadcast_to(step_J, (len(step_J), *pairs))
    out_AB = np.broadcast_to(length_B, pairs).astype(np.int16)
    every_B = np.arange(pairs[1])
    for i in range(a_AI.shape[1]):
        new_JAB = np.empty((len(step_J), *pairs), np.int16)
        new_JAB[0] = i + 1
        np.add(row_JAB[:-1], a_AI[None, :, i, None] != b_BJ.T[:, None, :], out=new_JAB[1:])
        np.minimum(new_JAB[1:], row_JAB[1:] + 1, out=new_JAB[1:])
        # An insertion costs one a step to the right: take that off, and it is a running minimum.
        new_JAB -= step_J
        np.minimum.accumulate(new_JAB, axis=0, out=new_JAB)
        new_JAB += step_J
        row_JAB = new_JAB
        done = length_A == i + 1
        if done.any():
            out_AB[done] = row_JAB[:, done][length_B, :, every_B].T
    return out_AB


@final
class Translation:
    """Which token of one vocabulary says what a token of another says; looked up when first asked for.

    Args:
        source: Whose tokens are translated.
        target: Into what.

    >>> few, many = Vocabulary(("a", "cat", "s")), Vocabulary(("cats", "a", "ca", "sat"))
    >>> Translation(few, many)(np.array([0, 1, 2, 7])).tolist()
    [1, 0, 1, -1]
    """

    __slots__ = ("_by_length", "_exact", "_known_V", "_roles", "source", "target")

    _UNKNOWN = -2

    def __init__(self, source: Vocabulary, target: Vocabulary) -> None:
        self.source, self.target = source, target
        self._exact: dict[str, int] = {}
        by_length: dict[int, list[int]] = {}
        for number, word in enumerate(target.strings):
            if word and word not in self._exact:
                self._exact[word] = number
                by_length.setdefault(len(word), []).append(number)
        self._by_length: dict[int, tuple[np.ndarray, _Coded]] = {
            length: (np.array(numbers), _coded([target.strings[n] for n in numbers], -2))
            for length, numbers in by_length.items()
        }
        # The roles last: one special token may have a role and a name.
        roles = sorted(source.special.items(), key=lambda item: item[0] in _ROLES)
        self._roles = {n: target.special[role] for role, n in roles if role in target.special}
        self._known_V = np.full(source.size, self._UNKNOWN, np.int64)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """The target's token for each of the source's, -1 where there is none; int64 of the same shape."""
        inside = (ids >= 0) & (ids < self.source.size)
        safe = np.where(inside, ids, 0).astype(np.int64)
        if self.source.size:
            queried = np.unique(safe[inside])
            for number in queried[self._known_V[queried] == self._UNKNOWN].tolist():
                self._known_V[number] = self._look_up(number)
        return np.where(inside, self._known_V[safe], -1) if self.source.size else np.full(ids.shape, -1, np.int64)

    def _look_up(self, number: int) -> int:
        word = self.source.strings[number]
        if not word:
            return self._roles.get(number, -1)
        return self._exact[word] if word in self._exact else self._nearest(word)

    def _nearest(self, word: str) -> int:
        """Strings whose lengths differ by d lie d apart at least: past the best distance none needs a look."""
        best, found = np.iinfo(np.int64).max, -1
        mine = _coded([word], -1)
        farthest = max((abs(length - len(word)) for length in self._by_length), default=-1)
        for apart in range(farthest + 1):
            if apart > best:
                break
            for length in {len(word) - apart, len(word) + apart} & self._by_length.keys():
                numbers, coded = self._by_length[length]
                distance_B = _distances(mine, coded)[0]
                at = int(distance_B.argmin())
                if (int(distance_B[at]), int(numbers[at])) < (best, found):
                    best, found = int(distance_B[at]), int(numbers[at])
        return found
