"""Parses codec specifications such as ``topk:8/256`` and ``int8``.

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

from lichen.core.errors import LichenError
from lichen.transforms.codec import Chain, Codec
from lichen.transforms.powersgd import PowerSGD
from lichen.transforms.quantize import Bfloat16, Quantize
from lichen.transforms.sign import Sign
from lichen.transforms.topk import TopK

__all__ = ["codec_of", "parse_codecs"]

_INT = re.compile(r"int([248])(~?)(?:/([1-9]\d{0,8}))?")
_SIGN = re.compile(r"sign(?:/([1-9]\d{0,8}))?")
_TOPK = re.compile(r"topk:([1-9]\d{0,8})/([1-9]\d{0,8})")
_POWERSGD = re.compile(r"sketch:([1-9]\d{0,5})(?:x([1-9]\d?))?")


def codec_of(word: str) -> Codec:
    """One codec by its word.

    Raises:
        LichenError: if there is none.

    >>> codec_of("int4~/64")
    Quantize(bits=4, block=64, stochastic=False)
    """
    if word == "bf16":
        return Bfloat16()
    if found := _INT.fullmatch(word):
        bits, nearest, block = found.groups()
        return Quantize(int(bits), block=int(block or 128), stochastic=not nearest)
    if found := _SIGN.fullmatch(word):
        return Sign(int(found[1] or 128))
    if found := _TOPK.fullmatch(word):
        return TopK(int(found[1]), int(found[2]))
    if found := _POWERSGD.fullmatch(word):
        return PowerSGD(int(found[1]), iterations=int(found[2] or 2))
    raise LichenError(
        f"no codec is called {word!r}",
        where="wire",
        fix="use float32, bf16, int8, int4, int2, sign, topk:8/256 or sketch:2",
    )


def parse_codecs(words: Sequence[str]) -> Chain:
    """Codecs one after another.

    Raises:
        LichenError: if a word is unknown, or one stands after a codec that leaves nothing.

    >>> parse_codecs(["topk:8/256", "int4"])
    Chain(codecs=(TopK(keep=8, chunk=256), Quantize(bits=4, block=128, stochastic=True)))
    """
    return Chain(() if tuple(words) == ("float32",) else tuple(codec_of(word) for word in words))
