"""Kinds of numbers that a model can have, and which are slow on this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from lichen.core.errors import LichenError

__all__ = ["dtype_of", "slow_dtype"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


_CPU_INFO = Path("/proc/cpuinfo")


def slow_dtype(dtype: str, device: str) -> str:
    """Why numbers of this kind are slow on a device; empty where they are not, or where nobody knows.

    A processor without instructions for bfloat16 takes each number apart: a product of matrices took 13 to 48 times as
    long as in float32 on the one that this was measured on.
    """
    if dtype != "bfloat16" or not device.startswith("cpu"):
        return ""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    features = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    if not features or features & {"avx512_bf16", "amx_bf16", "bf16"}:
        return ""
    return "this processor has no instructions for bfloat16, and computes it many times slower than float32"


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """A kind of number by its name.

    Raises:
        LichenError: if there is none.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise LichenError(f"no dtype {dtype!r}", where="model.dtype", fix=f"use one of: {', '.join(_DTYPES)}")
    return _DTYPES[dtype]
