"""Reads a GGUF file back: its keys, and its tensors as float32 under the names of transformers.

Nothing of a file is believed: every length is held against the bytes that are there before anything is made of it, so
that a damaged file is an error and never a long wait. Numbers are those that the ``gguf`` package dequantises.

Legend: N entries of an array.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.models.gguf.architectures import Architecture, Value, architecture_of, settings_of
from lichen.models.gguf.write import tensor_name

__all__ = ["read_gguf", "state_of"]

_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MOST_DIMENSIONS = 4
_MOST_DEPTH = 2
"""Of arrays in arrays."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor as it lies in a file.

    Attributes:
        shape: Rows last, as numpy has it.
        kind: The format's number.
        data: Its bytes.
    """

    shape: tuple[int, ...]
    kind: int
    data: np.ndarray

    def dense(self) -> np.ndarray:
        """The numbers, float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self.kind)
        plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
        with np.errstate(all="ignore"):  # scales that are not finite are numbers like any other here
            flat = self.data.view(plain).astype(np.float32) if plain else dequantize(self.data, kind)
        return np.asarray(flat, dtype=np.float32).reshape(self.shape)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """What a file holds.

    Attributes:
        fields: Values by key.
        tensors: By name; their bytes are read when they are needed.
    """

    fields: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


@final
class _Bytes:
    """Bytes that are read from the front, and never past their end."""

    def __init__(self, data: Any, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def fault(self, what: str) -> LichenError:
        return LichenError(
            f"the GGUF file is damaged: {what}, at byte {self.at:,}", where=self.where, fix="write it anew"
        )

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fault(f"{what} ends after the file")
        out = bytes(self.data[self.at : self.at + size])
        self.at += size
        return out

    def number(self, kind: Literal["<I", "<Q", "<i"], what: str) -> int:
        return int(struct.unpack(kind, self.take(struct.calcsize(kind), what))[0])

    def text(self, what: str) -> str:
        raw = self.take(self.number("<Q", what), what)
        with suppress(UnicodeDecodeError):
            return raw.decode()
        raise self.fault(f"{what} is no text")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize, what), _SCALARS[kind])[0].item()
        if kind == _BOOL:
            if (one := self.take(1, what)) in (b"\0", b"\1"):
                return one == b"\1"
            raise self.fault(f"{what} is neither true nor false")
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY or depth == _MOST_DEPTH:
            raise self.fault(f"{what} is of an unknown kind")
        inner, size = self.number("<I", what), self.number("<Q", what)
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(size * dtype.itemsize, what), dtype).tolist()
        if size > len(self.data) - self.at:  # each entry takes a byte at least
            raise self.fault(f"{what} ends after the file")
        return [self.value(inner, what, depth + 1) for _ in range(size)]


def read_gguf(file: Path) -> GgufFile:
    """The keys of a file, and where its tensors lie.

    Args:
        file: Of version 2 or 3, little-endian.

    Raises:
        LichenError: at the first byte that cannot be right.
    """
    with open(file, "rb") as handle:
        if not file.stat().st_size:
            raise LichenError("the GGUF file is empty", where=str(file), fix="write it anew")
        data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    front = _Bytes(data, str(file))
    if front.take(4, "its mark") != b"GGUF":
        raise LichenError("is no GGUF file", where=str(file), fix="name one that ends in .gguf")
    version = front.number("<I", "its version")
    if version not in (2, 3):
        raise LichenError(f"is GGUF of version {version}", where=str(file), fix="write it anew; 2 and 3 are read")
    tensors, keys = front.number("<Q", "the number of tensors"), front.number("<Q", "the number of keys")
    if max(tensors, keys) > len(data):
        raise front.fault("it counts more entries than it has bytes")
    fields: dict[str, Value] = {}
    for _ in range(keys):
        key = front.text("a key")
        if key in fields:
            raise front.fault(f"{key!r} stands there twice")
        fields[key] = front.value(front.number("<I", repr(key)), repr(key))
    return GgufFile(fields=fields, tensors=_tensors(front, tensors, fields))


def _tensors(front: _Bytes, count: int, fields: Mapping[str, Value]) -> dict[str, GgufTensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import _type_traits as traits  # which formats it dequantises

    align = fields.get("general.alignment", 32)
    if not isinstance(align, int) or isinstance(align, bool) or align < 8 or align & (align - 1):
        raise front.fault(f"its alignment is {align}")
    layout: dict[str, tuple[tuple[int, ...], int, int, int]] = {}
    for _ in range(count):
        name = front.text("the name of a tensor")
        dimensions = front.number("<I", name)
        if name in layout or not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise front.fault(f"tensor {name!r} stands there twice or has {dimensions} dimensions")
        shape = tuple(front.number("<Q", name) for _ in range(dimensions))[::-1]
        kind, offset = front.number("<I", name), front.number("<Q", name)
        known = kind in [int(one) for one in GGMLQuantizationType]
        if not known or (kind not in (0, 1) and GGMLQuantizationType(kind) not in traits):
            raise front.fault(f"tensor {name!r} is of an unknown format")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not all(shape) or shape[-1] % block or offset % align:
            raise front.fault(f"tensor {name!r} does not lie in whole blocks")
        layout[name] = (shape, kind, offset, prod(shape) // block * size)
    start = -(-front.at // align) * align
    whole = np.frombuffer(front.data, np.uint8)
    out = {}
    for name, (shape, kind, offset, size) in layout.items():
        if start + offset + size > len(whole):
            raise front.fault(f"tensor {name!r} ends after the file")
        out[name] = GgufTensor(shape=shape, kind=kind, data=whole[start + offset : start + offset + size])
    return out


def state_of(file: Path, model: Any) -> dict[str, Tensor]:
    """Every parameter of a model as the file holds it, float32, tied ones once.

    Args:
        file: As :func:`lichen.models.gguf.write.write_gguf` writes it.
        model: A transformers model of the same shape.

    Raises:
        LichenError: if the file is damaged, or holds another model.
    """
    found, config = read_gguf(file), model.config
    architecture, blocks = architecture_of(config), int(config.num_hidden_layers)
    for key, value in settings_of(config).items():
        stands = found.fields.get(key)
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if stands != expected:
            raise _other(file, f"{key} is {stands}, not {value}")
    out = {}
    for name, parameter in model.named_parameters():
        module, called = tensor_name(architecture, blocks, name)
        out[name] = torch.from_numpy(_dense(file, found, architecture, module, called, config))
        if out[name].shape != parameter.shape:
            raise _other(file, f"{called} is {tuple(out[name].shape)}, not {tuple(parameter.shape)}")
    extra = sorted(set(found.tensors) - {tensor_name(architecture, blocks, name)[1] for name in out})
    if [name for name in extra if name != "rope_freqs.weight"]:
        raise _other(file, f"it has {extra[0]} more")
    return out


def _dense(
    file: Path, found: GgufFile, architecture: Architecture, module: str, called: str, config: Any
) -> np.ndarray:
    if called not in found.tensors:
        raise _other(file, f"it lacks {called}")
    return architecture.from_gguf(module, found.tensors[called].dense(), config)


def _other(file: Path, what: str) -> LichenError:
    return LichenError(f"the GGUF file holds another model: {what}", where=str(file), fix="write it anew")
