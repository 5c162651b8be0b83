"""Writes a language model and its tokenizer as one GGUF file, in a format of so many bits a weight.

Norms, biases and learned positions stay float32; matrices take the format where their rows divide into its blocks, and
float16 where they do not. Rounding is that of the ``gguf`` package, to the nearest code of each block of 32 weights.

References:
    GGUF, the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.models.gguf.architectures import Architecture, Value, architecture_of, rope_factors, settings_of
from lichen.models.gguf.vocabulary import vocabulary_of

__all__ = ["FORMATS", "Bits", "Written", "header_of", "named_tensors", "tensor_name", "write_gguf"]

Bits = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16"]
FORMATS: tuple[Bits, ...] = get_args(Bits)
"""From small to large: 4.5, 5, 5.5, 6, 8.5 and 16 bits a weight."""
_FILE_TYPE: Mapping[Bits, int] = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}
_EXACT = ("position_embd.weight", "rope_freqs.weight")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What became of a model.

    Attributes:
        bits: The format that was asked for.
        as_float16: Matrices that are float16 instead, as their rows do not divide into blocks.
        size_bytes: Of the file.
    """

    bits: Bits
    as_float16: tuple[str, ...]
    size_bytes: int


def header_of(model: Any, tokenizer: Any, *, name: str = "") -> dict[str, Value]:
    """Everything that stands before the tensors, but for the format, under GGUF's keys.

    Args:
        model: A transformers language model.
        tokenizer: Its tokenizer, with its chat template.
        name: What the model is called.

    Raises:
        LichenError: if the architecture or the tokenizer has no form in GGUF here.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    named: dict[str, Value] = {"general.type": "model", **({"general.name": name} if name else {})}
    return {**settings_of(model.config), **named, **vocabulary_of(tokenizer, rows)}


def tensor_name(architecture: Architecture, blocks: int, name: str) -> tuple[str, str]:
    """``(module, name in GGUF)`` of a parameter of transformers.

    Raises:
        LichenError: if GGUF has no name for it.
    """
    module, _, leaf = name.rpartition(".")
    found = architecture.names(blocks).get(module)
    if found is None or leaf not in ("weight", "bias"):
        raise LichenError(f"{architecture.name} has no tensor {name!r} in GGUF", where="--gguf", fix="use --merge")
    return module, f"{found}.{leaf}"


def named_tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as GGUF names and holds it, in float32, tied ones once.

    Args:
        model: A transformers language model.

    Raises:
        LichenError: if a tensor has no name there, or holds numbers that are not finite.
    """
    config = model.config
    found, blocks = architecture_of(config), int(config.num_hidden_layers)
    if (factor_D := rope_factors(config)) is not None:
        yield "rope_freqs.weight", factor_D
    for name, parameter in model.named_parameters():
        module, called = tensor_name(found, blocks, name)
        x = _array(parameter)
        if not np.isfinite(x).all():
            raise LichenError(f"tensor {name!r} holds numbers that are not finite", where="--gguf", fix="train it anew")
        yield called, found.to_gguf(module, x, config)


def _array(parameter: Tensor) -> np.ndarray:
    out: np.ndarray = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
    return out


def write_gguf(file: Path, model: Any, tokenizer: Any, *, bits: Bits, name: str = "") -> Written:
    """Write the file; one tensor at a time is rounded.

    Args:
        file: Where to.
        model: A transformers language model, not rounded.
        tokenizer: Its tokenizer, with its chat template.
        bits: The format of matrices.
        name: What the model is called.

    Returns:
        What became of it.

    Raises:
        LichenError: as :func:`header_of` and :func:`named_tensors`.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter
    from gguf.quants import quantize

    header = header_of(model, tokenizer, name=name)
    writer = GGUFWriter(None, str(header.pop("general.architecture")))
    for key, value in header.items():
        _add(writer, key, value)
    writer.add_file_type(_FILE_TYPE[bits])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    kinds = {}
    for called, x in named_tensors(model):
        kinds[called] = kind = _kind_of(called, x, bits)
        writer.add_tensor_info(called, x.shape, np.dtype(np.float32), _size_of(x, kind), raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for called, x in named_tensors(model):
        with np.errstate(over="ignore"):  # too large for float16 is infinite, and the gate refuses it
            writer.write_tensor_data(quantize(x, kinds[called]))
    writer.close()
    kind_of_bits = _kind(bits)
    as_float16 = tuple(called for called, kind in kinds.items() if kind.name == "F16" and kind != kind_of_bits)
    return Written(bits=bits, as_float16=as_float16, size_bytes=file.stat().st_size)


def _kind(bits: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[bits.upper()]


def _kind_of(called: str, x: np.ndarray, bits: Bits) -> Any:
    from gguf import GGML_QUANT_SIZES

    if x.ndim < 2 or called in _EXACT:
        return _kind("f32")
    kind_of_bits = _kind(bits)
    return _kind("f16") if x.shape[-1] % GGML_QUANT_SIZES[kind_of_bits][0] else kind_of_bits


def _size_of(x: np.ndarray, kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return int(x.size // block * size)


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
