"""Writes what a run learned as files that other tools load, in whichever form is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lichen.recipes.artifacts.use.export import export as export_whole
from lichen.recipes.quantize.requested import AnyBits, requested
from lichen.recipes.quantize.run import export_quantized
from lichen.recipes.quantize.student import export_student

__all__ = ["export"]


def export(
    folder: Path | str,
    *,
    merge: bool = False,
    out: Path | str | None = None,
    client: str | None = None,
    gguf: bool = False,
    bits: AnyBits | None = None,
    quantize: Literal["int8"] | None = None,
    gate: float | None = None,
    student: bool = False,
) -> Path:
    """Write the run's model: the adapter as it is, a transformers folder with everything merged, or fewer bits.

    Args:
        folder: The run folder; that of several stages means the last one.
        merge: Merge into the base's weights; else it is the adapter.
        out: Where to; by default in the run's folder, and for the adapter where it lies.
        client: The model of this client's own; by default the one that all share. It is private, and so is what is
            written: by default in ``folder/own``.
        gguf: One merged GGUF file, as llama.cpp runs it.
        bits: Its format; ``auto``, the default, for the smallest that passes the gate. Of a student ``f32``, the
            default, ``f16``, ``int8`` or ``auto``.
        quantize: ``int8``: a merged transformers folder in 8 bits.
        gate: Share by which perplexity on the clients' validation rows may rise by fewer bits, 0.01 if not given;
            twice that on general text. Of a student: the share by which the run's metric may get worse.
        student: A run's student, as a folder that plain torch loads.

    Returns:
        The file or folder that loads elsewhere.

    Raises:
        LichenError: if the run is not finished, has nothing of the kind, or what fewer bits cost is over the gate.
    """
    choice = requested(merge=merge, gguf=gguf, bits=bits, quantize=quantize, student=student, gate=gate)
    if choice.form == "student":
        return export_student(folder, bits=choice.student_bits, gate=choice.gate, out=out, client=client).path
    if choice.form == "fewer":
        return export_quantized(folder, bits=choice.bits, gate=choice.gate, out=out, client=client).path
    return export_whole(folder, merge=merge, out=out, client=client)
