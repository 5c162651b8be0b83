"""What the words of ``lichen export`` ask for, and which of them go together. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

from lichen.core.errors import LichenError

__all__ = ["GATE", "AnyBits", "GgufBits", "requested", "require_format", "require_gate"]

GATE = 0.01
"""Share by which a score may get worse, where nobody says."""

GgufBits = Literal["auto", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16"]
"""Formats of GGUF, and the smallest that passes."""
StudentBitsOrAuto = Literal["auto", "int8", "f16", "f32"]
"""How a student's numbers are written, and the smallest that passes."""
AnyBits = Literal["auto", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "int8", "f32"]
"""All of them."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Requested:
    """What is to be written.

    Attributes:
        form: An adapter, a merged folder, a merged model in fewer bits, or a student.
        bits: Of GGUF, or of an int8 folder.
        student_bits: Of a student.
        gate: Share by which a score may get worse.
    """

    form: Literal["adapter", "merged", "fewer", "student"]
    bits: GgufBits | Literal["int8"] = "auto"
    student_bits: StudentBitsOrAuto = "f32"
    gate: float = GATE


def requested(
    *,
    merge: bool = False,
    gguf: bool = False,
    bits: AnyBits | None = None,
    quantize: Literal["int8"] | None = None,
    student: bool = False,
    gate: float | None = None,
) -> Requested:
    """What these words ask for.

    Raises:
        LichenError: if two of them do not go together, or one says nothing.

    >>> requested(student=True, bits="int8").student_bits
    'int8'
    """
    require_gate(GATE if gate is None else gate)
    if student:
        return _student(merge=merge, gguf=gguf, bits=bits, quantize=quantize, gate=gate)
    if bits is not None and not gguf:
        what = "only GGUF files and students have such formats"
        raise LichenError(what, where="--bits", fix="add --gguf or --student, or leave it out")
    fewer = gguf or quantize is not None
    if gate is not None and not fewer:
        raise LichenError("nothing is rounded, so nothing is lost", where="--gate", fix="add --gguf or --quantize int8")
    if merge and fewer:
        raise LichenError("fewer bits are merged anyway", where="--merge", fix="leave it out")
    if gguf and quantize is not None:
        raise LichenError("GGUF has formats of its own", where="--quantize", fix="use --gguf --bits q8_0")
    if not fewer:
        return Requested(form="merged" if merge else "adapter")
    if quantize is not None and quantize != "int8":
        raise LichenError(f"there is no format {quantize!r}", where="--quantize", fix="use int8")
    if bits is not None:
        require_format(bits, get_args(GgufBits), "a GGUF file")
    return Requested(form="fewer", bits=quantize or bits or "auto", gate=GATE if gate is None else gate)  # type: ignore[arg-type]


def _student(
    *, merge: bool, gguf: bool, bits: AnyBits | None, quantize: Literal["int8"] | None, gate: float | None
) -> Requested:
    for given, word in ((merge, "--merge"), (gguf, "--gguf")):
        if given:
            raise LichenError("a student is whole, and has a form of its own", where=word, fix="leave it out")
    if quantize is not None:
        raise LichenError("a student has formats of its own", where="--quantize", fix="use --student --bits int8")
    small = bits or "f32"
    require_format(small, get_args(StudentBitsOrAuto), "a student")
    if gate is not None and small == "f32":
        fix = "add --bits auto, int8 or f16, or leave it out"
        raise LichenError("nothing is rounded, so nothing is lost", where="--gate", fix=fix)
    chosen: StudentBitsOrAuto = small  # type: ignore[assignment]  # one of these, as was just seen
    return Requested(form="student", student_bits=chosen, gate=GATE if gate is None else gate)


def require_format(bits: str, formats: tuple[str, ...], what: str) -> None:
    """Refuse a format that is none of these.

    Args:
        bits: Its name.
        formats: Those there are.
        what: Whose formats they are.

    Raises:
        LichenError: naming them.
    """
    if bits not in formats:
        raise LichenError(f"{what} has no format {bits!r}", where="--bits", fix=f"use {', '.join(formats)}")


def require_gate(gate: float) -> None:
    """Refuse what is no share by which a score may get worse.

    Args:
        gate: 0 or more.

    Raises:
        LichenError: if it is negative, infinite or not a number.
    """
    if not 0 <= gate < float("inf"):
        raise LichenError(f"{gate} is no share", where="--gate", fix="use a number such as 0.01")
