"""The command ``export``: writes what a run learned as files that other tools load.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lichen.recipes.quantize.requested import AnyBits, requested
from lichen.shell import crash_in, log, say, show

if TYPE_CHECKING:
    from lichen.recipes.quantize.run import Quantized
    from lichen.recipes.quantize.student import ExportedStudent

__all__ = ["export_command"]


def export_command(
    folder: Path,
    /,
    *,
    merge: bool = False,
    out: Path | None = None,
    client: str | None = None,
    gguf: bool = False,
    bits: AnyBits | None = None,
    quantize: Literal["int8"] | None = None,
    gate: float | None = None,
    student: bool = False,
) -> None:
    """Write what a run learned as files other tools load.

    With --gguf or --quantize the merged model is rounded, read back and scored. It is written only if its perplexity
    stays within the gate, on the clients' validation rows and on the recipe's retention text. A rounded student is held
    against the run's metric on those rows.

    Parameters
    ----------
    folder
        A finished run.
    merge
        Write one whole model instead of an adapter.
    out
        Where to; in the run's folder if not given.
    client
        The model of this client's own, by its name in clients.csv, where the run has such models; it is private.
    gguf
        Write the merged model as one GGUF file, as llama.cpp runs it.
    bits
        With --gguf: its format; auto, the default, for the smallest that passes the gate. With --student: f32, the
        default, f16, int8 or auto.
    quantize
        int8: write the merged model as a transformers folder in 8 bits.
    gate
        Share by which perplexity on the clients' rows may rise by fewer bits, or a student's score fall; 0.01 if not
        given. On general text perplexity may rise by twice that.
    student
        Write a run's student as a folder that plain torch loads, with the code that does.
    """
    choice = requested(merge=merge, gguf=gguf, bits=bits, quantize=quantize, student=student, gate=gate)
    table: Callable[[], None] | None = None
    with crash_in(folder), redirect_stdout(sys.stderr):
        if choice.form == "student":
            from lichen.recipes.quantize.student import export_student

            exported = export_student(
                folder, bits=choice.student_bits, gate=choice.gate, out=out, client=client, say=log
            )
            written, table = exported.path, partial(_show_student, exported)
        elif choice.form == "fewer":
            from lichen.recipes.quantize.run import export_quantized

            done = export_quantized(folder, bits=choice.bits, gate=choice.gate, out=out, client=client, say=log)
            written, table = done.path, partial(_show, done)
        else:
            from lichen.recipes.quantize.export import export

            written = export(folder, merge=merge, out=out, client=client)
    if table is not None:
        table()
    say(str(written))


def _show(done: Quantized) -> None:
    from lichen.present.table import new_table
    from lichen.present.units import bytes_text, score_text

    heads = ("format", "size", "clients' rows", "general text", "same tokens", "within the gate")
    table = new_table(None, *heads, numbers=heads[1:5])
    scores = done.before
    table.add_row("merged, not rounded", "", score_text(scores.clients), score_text(scores.general), "", "")
    for one in done.attempts:
        numbers = (score_text(one.scores.clients), score_text(one.scores.general), f"{100 * one.agreement:.1f} %")
        table.add_row(one.name, bytes_text(one.size_bytes), *numbers, "no" if one.faults else "yes")
    show(table)
    if larger := done.attempts[-1].larger:
        say(f"float16, as their rows do not divide into blocks of 32: {len(larger)} matrices, such as {larger[0]}")


def _show_student(done: ExportedStudent) -> None:
    from lichen.present.table import new_table
    from lichen.present.units import bytes_text, score_text

    if done.before is None:
        return
    heads = ("format", "size", done.metric, "same classes", "within the gate")
    table = new_table(None, *heads, numbers=heads[1:4])
    table.add_row("not rounded", "", score_text(done.before), "", "")
    for one in done.attempts:
        same = "" if one.agreement is None else f"{100 * one.agreement:.1f} %"
        passes = "no" if one.fault else "yes"
        table.add_row(one.name, bytes_text(one.size_bytes), score_text(one.value), same, passes)
    show(table)
