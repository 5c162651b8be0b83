"""What a blob says beside its tensors, read strictly: whatever is not of its kind is a :class:`ValueError`.

Everything that a sender can make large has a bound here, in its unit; a reader may set that of texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["MOST_CLIENTS", "MOST_NAMES", "MOST_TEXT", "Fields", "decode_texts", "encode_texts", "require_tensor"]

MOST_CLIENTS = 1 << 16
"""Clients of one blob."""

MOST_NAMES = 1 << 14
"""Settings of one job, metrics of one message."""

MOST_TEXT = 1 << 26
"""Bytes of all texts of one blob, in UTF-8, unless its reader is given another bound."""


@final
@dataclass(frozen=True, slots=True)
class Fields:
    """The named fields of a blob.

    >>> fields = Fields({"group": "g", "metrics": ["loss"]})
    >>> fields.text("group"), fields.names("metrics"), fields.count("steps", most=9)
    ('g', ['loss'], 0)
    """

    found: Mapping[str, Any]

    def only(self, *names: str) -> None:
        """Refuse every field but these."""
        if other := self.found.keys() - set(names):
            raise ValueError(f"unknown field {min(other)!r}")

    def text(self, name: str) -> str:
        """A text; empty where there is none."""
        text = self.found.get(name, "")
        if not isinstance(text, str):
            raise ValueError(f"{name} is no text")
        return text

    def names(self, name: str) -> list[str]:
        """A list of names, no two alike; empty where there is none."""
        names = self.found.get(name, [])
        if not isinstance(names, list) or len(names) > MOST_NAMES:
            raise ValueError(f"{name} is no list of at most {MOST_NAMES} names")
        if not all(isinstance(each, str) for each in names) or len(set(names)) < len(names):
            raise ValueError(f"{name} holds what is no text, or one name twice")
        return names

    def count(self, name: str, *, most: int) -> int:
        """A whole number from 0 to ``most``; 0 where there is none."""
        count = self.found.get(name, 0)
        if type(count) is not int or not 0 <= count <= most:  # a truth value is an int to isinstance
            raise ValueError(f"{name} is {count!r}, not a whole number of at most {most}")
        return count

    def lengths(self, name: str) -> list[int]:
        """A list of whole numbers from 0 on; empty where there is none."""
        return _lengths(self.found.get(name, []), name)

    def lengths_C(self, name: str, clients: int) -> list[list[int]]:
        """Such a list for each of so many clients; empty where there is none."""
        found = self.found.get(name, [])
        if not isinstance(found, list) or len(found) not in (0, clients):
            raise ValueError(f"{name} is no list of {clients}")
        return [_lengths(each, name) for each in found]


def _lengths(found: Any, name: str) -> list[int]:
    if not isinstance(found, list) or not all(type(each) is int and each >= 0 for each in found):
        raise ValueError(f"{name} holds what is no length")
    return found


def require_tensor(x: Tensor, name: str, dtype: torch.dtype, dim: int) -> Tensor:
    """The tensor, if it is of this dtype and has so many axes."""
    if x.dtype != dtype or x.dim() != dim:
        raise ValueError(f"{name} is {x.dtype} of {x.dim()} axes, expected {dtype} of {dim}")
    return x


def encode_texts(texts: Sequence[str]) -> tuple[list[int], Tensor]:
    """``(bytes of each text, the bytes of all)``, in UTF-8; lone surrogates pass.

    >>> encode_texts(["a", "\u00e4"])
    ([1, 2], tensor([ 97, 195, 164], dtype=torch.uint8))
    """
    encoded = [text.encode(errors="surrogatepass") for text in texts]
    data = bytearray(b"".join(encoded))
    return [len(text) for text in encoded], torch.frombuffer(data or bytearray(1), dtype=torch.uint8)[: len(data)]


def decode_texts(lengths: Sequence[int], data: Tensor, most_text: int) -> tuple[str, ...]:
    """Undo :func:`encode_texts`, of at most ``most_text`` bytes."""
    data = require_tensor(data, "the tensor of texts", torch.uint8, 1)
    if len(data) > most_text:
        raise ValueError(f"texts of {len(data)} bytes, {most_text} at most")
    if sum(lengths) != len(data):
        raise ValueError(f"texts of {sum(lengths)} bytes in {len(data)}")
    letters, at, texts = data.numpy().tobytes(), 0, []
    for length in lengths:
        texts.append(letters[at : at + length].decode(errors="surrogatepass"))
        at += length
    return tuple(texts)
