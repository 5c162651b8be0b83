"""The command ``export``: writes what a run learned as files that other tools load.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lichen.core.errors import LichenError
from lichen.shell import crash_in, log, say, show

if TYPE_CHECKING:
    from lichen.recipes.quantize.run import Quantized

__all__ = ["export_command"]


def export_command(
    folder: Path,
    /,
    *,
    merge: bool = False,
    out: Path | None = None,
    client: str | None = None,
    gguf: bool = False,
    bits: Literal["auto", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16"] | None = None,
    quantize: Literal["int8"] | None = None,
    gate: float | None = None,
) -> None:
    """Write what a run learned as files other tools load.

    With --gguf or --quantize the merged model is rounded, read back and scored. It is written only if its perplexity
    stays within the gate, on the clients' validation rows and on the recipe's retention text.

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
        With --gguf: its format; auto, the default, for the smallest that passes the gate.
    quantize
        int8: write the merged model as a transformers folder in 8 bits.
    gate
        Share by which perplexity on the clients' rows may rise by fewer bits; 0.01 if not given. On general text it
        may rise by twice that.
    """
    if bits is not None and not gguf:
        raise LichenError("only GGUF has such formats", where="--bits", fix="add --gguf, or leave it out")
    fewer = gguf or quantize is not None
    if gate is not None and not fewer:
        raise LichenError("nothing is rounded, so nothing is lost", where="--gate", fix="add --gguf or --quantize int8")
    if merge and fewer:
        raise LichenError("fewer bits are merged anyway", where="--merge", fix="leave it out")
    if gguf and quantize is not None:
        raise LichenError("GGUF has formats of its own", where="--quantize", fix="use --gguf --bits q8_0")
    if not fewer:
        with crash_in(folder), redirect_stdout(sys.stderr):
            from lichen.recipes import run as run_module

            written = run_module.export(folder, merge=merge, out=out, client=client)
        say(str(written))
        return
    with crash_in(folder), redirect_stdout(sys.stderr):
        from lichen.recipes.quantize.run import GATE, export_quantized

        share = GATE if gate is None else gate
        done = export_quantized(folder, bits=quantize or bits or "auto", gate=share, out=out, client=client, say=log)
    _show(done)
    say(str(done.path))


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
