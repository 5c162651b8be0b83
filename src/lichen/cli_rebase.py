"""The command ``rebase``: puts a finished run on another base, and says which of the two is to be used.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

from lichen.shell import crash_in, log, print_json, say, show

__all__ = ["rebase_command"]


def rebase_command(
    folder: Path,
    /,
    *,
    model: str,
    how: Literal["as-is", "distil", "restart"] = "as-is",
    rounds: int | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    tolerance: float = 0.02,
    harmed: float = 0.25,
    json: bool = False,
) -> None:
    """Put a finished run on another base, in a new folder beside it, and say which of the two is to be used.

    Both are held against each other on the clients' validation rows and on the recipe's retention text. The old run
    stays as it is. The same command goes on after a stop.

    Parameters
    ----------
    folder
        The finished run; its data are opened again.
    model
        The new base: a catalog name, local folder, GGUF file or hub id.
    how
        as-is: the adapter on a base of the same shapes and vocabulary; distil: the old model answers questions, and an
        adapter of the new base learns the answers at the server; restart: anew.
    rounds
        At the clients, then; as many as the old run had if not given.
    prompts
        With distil: a file of rows with a column prompt, which are asked; the recipe's public rows if not given.
    out
        The new folder; FOLDER-rebased if not given.
    tolerance
        Share by which the worst tenth of the clients and general text may be worse on the new base.
    harmed
        Share of the clients that the new base may serve worse.
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
    with crash_in(out or folder), redirect_stdout(sys.stderr):
        from lichen.recipes.rebase.run import rebase

        found = rebase(
            folder,
            model,
            how=how,
            rounds=rounds,
            prompts=prompts,
            out=out,
            tolerance=tolerance,
            most_harmed=harmed,
            say=log,
        )
    if json:
        print_json(found.as_dict())
        return
    from lichen.present.table import new_table
    from lichen.present.units import score_text

    heads = ("bits a byte" if found.before.general is not None else "loss", "mean", "worst decile", "general text")
    table = new_table(None, *heads, numbers=heads[1:])
    named = {"old base": found.before, f"new base, {how}": found.start, "new base, after the rounds": found.after}
    for name, answer in named.items():
        table.add_row(name, *(score_text(value) for value in (answer.mean, answer.worst_decile, answer.general)))
    show(table)
    say(f"clients served worse: {100 * found.verdict.harmed:.0f} %")
    for fault in found.verdict.faults:
        say(f"against the new base: {fault}")
    say(f"use: {found.new if found.verdict.accepted else found.old}")
