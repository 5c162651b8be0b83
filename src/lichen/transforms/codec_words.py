"""Reads the words of codecs, such as ``topk:8/256`` and ``int8``, without loading what codes.

===================  =====================================================================
``float32``          alone: numbers as they are, for steps that leave out what stands still
``bf16``             :class:`~lichen.transforms.quantize.Bfloat16`
``int8`` ``int4``    :class:`~lichen.transforms.quantize.Quantize`, stochastic; ``int2`` too,
                     ``int4/64`` in blocks of 64, ``int4~`` rounds to nearest
``sign``             :class:`~lichen.transforms.sign.Sign`; ``sign/64`` in blocks of 64
``topk:8/256``       :class:`~lichen.transforms.topk.TopK`, 8 of every 256
``sketch:2``         :class:`~lichen.transforms.powersgd.PowerSGD` of rank 2; ``sketch:2x1``: one iteration
===================  =====================================================================
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lichen.core.errors import LichenError
from lichen.declared import Property

__all__ = ["CHANGE", "CODED_LACKS", "read_codecs", "token_fault"]

CHANGE = "change"
"""The word at the head of a chain: send what has changed of a row since its last visit."""

CODED_LACKS = frozenset({Property.SUMS})
"""What does not hold where messages are coded."""

_INT = re.compile(r"int([248])(~?)(?:/([1-9]\d{0,8}))?")
_SIGN = re.compile(r"sign(?:/([1-9]\d{0,8}))?")
_TOPK = re.compile(r"topk:([1-9]\d{0,8})/([1-9]\d{0,8})")
_POWERSGD = re.compile(r"sketch:([1-9]\d{0,5})(?:x([1-9]\d?))?")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _CodecWord:
    """A codec, read: its class and what that takes.

    Attributes:
        family: Name of the class.
        arguments: By name.
        last: Nothing is left to a codec after it.
    """

    family: str
    arguments: dict[str, int]
    last: bool


def read_codec(word: str) -> _CodecWord:
    """One codec by its word.

    Raises:
        LichenError: if there is none.

    >>> read_codec("topk:8/256").arguments
    {'keep': 8, 'chunk': 256}
    """
    if word == "bf16":
        return _CodecWord(family="Bfloat16", arguments={}, last=True)
    if found := _INT.fullmatch(word):
        bits, nearest, block = found.groups()
        arguments = {"bits": int(bits), "block": int(block or 128), "stochastic": not nearest}
        return _CodecWord(family="Quantize", arguments=arguments, last=True)
    if found := _SIGN.fullmatch(word):
        return _CodecWord(family="Sign", arguments={"block": int(found[1] or 128)}, last=True)
    if found := _TOPK.fullmatch(word):
        keep, chunk = int(found[1]), int(found[2])
        if keep > chunk:
            raise LichenError(f"cannot keep {keep} of {chunk} numbers", where="wire", fix="use for example 8 of 256")
        return _CodecWord(family="TopK", arguments={"keep": keep, "chunk": chunk}, last=False)
    if found := _POWERSGD.fullmatch(word):
        arguments = {"rank": int(found[1]), "iterations": int(found[2] or 2)}
        return _CodecWord(family="PowerSGD", arguments=arguments, last=False)
    raise LichenError(
        f"no codec is called {word!r}",
        where="wire",
        fix="use float32, bf16, int8, int4, int2, sign, topk:8/256 or sketch:2",
    )


def read_codecs(words: Sequence[str]) -> tuple[_CodecWord, ...]:
    """Codecs one after another.

    Raises:
        LichenError: if a word is unknown, or one stands after a codec that leaves nothing.

    >>> [one.family for one in read_codecs(["topk:8/256", "int4"])]
    ['TopK', 'Quantize']
    """
    read = () if tuple(words) == ("float32",) else tuple(read_codec(word) for word in words)
    for one in read[:-1]:
        if one.last:
            raise LichenError(
                f"{one.family} leaves nothing for {read[-1].family}",
                where="wire",
                fix="put the codec that writes numbers last, for example: topk, int4",
            )
    return read


def token_fault(words: Sequence[str]) -> str:
    """Why words are no code of tokens, with what to do; empty where they are.

    >>> token_fault(["sketch:4"]).partition(";")[0]
    'sketch codes matrices, and a token is a vector'
    """
    try:
        read = read_codecs(words)
    except LichenError as error:
        return f"{error.what}; {error.fix}"
    if any(one.family == "PowerSGD" for one in read):
        return "sketch codes matrices, and a token is a vector; use bf16, int8, int4 or topk"
    return ""
