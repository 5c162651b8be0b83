"""The formats in which a merged model is written in fewer bits: one GGUF file, or an int8 folder of transformers.

Of the libraries whose int8 transformers reads by itself, bitsandbytes is the one that this package and PEFT already
use; its codes are written, read and multiplied on a processor alone, and its configuration lies in the folder's
``config.json``.

References:
    Tim Dettmers, Mike Lewis, Younes Belkada and Luke Zettlemoyer. "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale." NeurIPS 2022. https://arxiv.org/abs/2208.07339
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from lichen.core.errors import LichenError
from lichen.models.adapters.quantized import quiet_import
from lichen.models.gguf.read import state_of
from lichen.models.gguf.write import FORMATS, Bits, write_gguf

__all__ = ["Format", "gguf_formats", "int8_format"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to write a model in fewer bits.

    Attributes:
        name: As the command names it.
        write: Writes a file or folder, and says what stays as it was.
        read: The model in it, to be scored.
    """

    name: str
    write: Callable[[Path], Sequence[str]]
    read: Callable[[Path], Any]


def gguf_formats(model: Any, tokenizer: Any, *, name: str, bits: Bits | None) -> tuple[Format, ...]:
    """The formats of GGUF from small to large, beginning with the one that is named.

    Args:
        model: The merged model, float32.
        tokenizer: Its tokenizer.
        name: What the model is called.
        bits: The smallest that is names; None for all.
    """
    scratch = copy.deepcopy(model)

    def write(file: Path, bits: Bits) -> Sequence[str]:
        return write_gguf(file, model, tokenizer, bits=bits, name=name).as_float16

    def read(file: Path) -> Any:
        state = state_of(file, scratch)
        with torch.no_grad():
            for called, parameter in scratch.named_parameters():
                parameter.copy_(state[called])
        return scratch

    names = FORMATS[FORMATS.index(bits) if bits else 0 :]
    return tuple(Format(name=one, write=partial(write, bits=one), read=read) for one in names)


def int8_format(model: Any, tokenizer: Any, finish: Callable[[Path], None]) -> Format:
    """Linear layers in 8 bits with a scale a row, as transformers loads them with bitsandbytes.

    Args:
        model: The merged model, float32.
        tokenizer: Its tokenizer.
        finish: Puts the rest into the folder.

    Raises:
        LichenError: if bitsandbytes is not installed.
    """
    try:
        with quiet_import():
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise LichenError(
            "int8 folders need the library bitsandbytes, which is not installed",
            where="--quantize int8",
            fix="pip install 'lichen[quantized]'",
        ) from None
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def write(folder: Path) -> Sequence[str]:
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            model.save_pretrained(aside)
            config = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
            with quiet_import():
                coded = AutoModelForCausalLM.from_pretrained(aside, quantization_config=config, dtype=torch.float32)
        coded.config.name_or_path = ""
        coded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        finish(folder)
        return ()

    def read(folder: Path) -> Any:
        with quiet_import():
            model: Any = AutoModelForCausalLM.from_pretrained(folder)
        return model.eval()

    return Format(name="int8", write=write, read=read)
