"""Makes codecs of their words (:mod:`lichen.transforms.codec_words`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lichen.transforms.codec import Chain, Codec
from lichen.transforms.codec_words import read_codecs
from lichen.transforms.powersgd import PowerSGD
from lichen.transforms.quantize import Bfloat16, Quantize
from lichen.transforms.sign import Sign
from lichen.transforms.topk import TopK

__all__ = ["parse_codecs"]

_FAMILIES: Mapping[str, Callable[..., Codec]] = {
    made.__name__: made for made in (Bfloat16, PowerSGD, Quantize, Sign, TopK)
}


def parse_codecs(words: Sequence[str]) -> Chain:
    """Codecs one after another.

    Raises:
        LichenError: if a word is unknown, or one stands after a codec that leaves nothing.

    >>> parse_codecs(["topk:8/256", "int4~/64"])
    Chain(codecs=(TopK(keep=8, chunk=256), Quantize(bits=4, block=64, stochastic=False)))
    """
    return Chain(tuple(_FAMILIES[one.family](**one.arguments) for one in read_codecs(words)))
