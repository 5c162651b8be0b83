"""The command ``forget``: a new run to which a client never came, what a run holds of it, and taking that out.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lichen.core.errors import LichenError
from lichen.shell import crash_in, log, print_json, say, show

__all__ = ["forget_command"]

How = Literal["subtract", "replay", "eraser", "negate", "npo"]


def forget_command(
    folder: Path,
    /,
    *,
    client: str | None = None,
    how: How | None = None,
    out: Path | None = None,
    list_: Annotated[bool, Parameter(name="--list")] = False,
    rows: Path | None = None,
    purge: bool = False,
    basis: str = "",
    requested: Annotated[str, Parameter(name="--asked")] = "",
    federation: Path | None = None,
    against: Path | None = None,
    every: int | None = None,
    local: float | None = None,
    rate: float | None = None,
    repair: int | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    gamma: float | None = None,
    rounds: int | None = None,
    json: bool = False,
) -> None:
    """Forget a client of a finished run: a new folder with the model of a run to which it never came, or nearly.

    The old folder stays as it is, unless --purge is given. The same command goes on after a stop.

    Parameters
    ----------
    folder
        The finished run; its data are opened again.
    client
        Who is to be forgotten: a name of the run's roster.json. Without it --purge ends a purge that was stopped.
    how
        subtract: its statistics are taken off the sums of task oneshot; replay: the others train again from the last
        state that does not depend on it; eraser, negate, npo: approximations, which come near and do not say how near.
        By default subtract where that is all there is, else replay.
    out
        The new folder; FOLDER-without-CLIENT if not given.
    against
        A run that was trained or replayed without the client, which the new model is held against.
    every
        eraser: rounds from one that is used to the next; 2 if not given.
    local
        eraser: the others' local steps or passes, as a share of the run's; 0.5 if not given.
    rate
        negate: how much of the client's shares is taken off; 1 if not given.
    repair
        negate: rounds of the others after that; 2 if not given.
    beta
        npo: the smaller, the more it is gradient ascent; 0.1 if not given.
    alpha
        npo: factor on the learning rate of the others' rounds; 1 if not given.
    gamma
        npo: factor on that of the client's own rounds; 1 if not given.
    rounds
        npo: rounds in all, the client's and the others' in turns; 4 if not given.
    list_
        Name each file of the folder that holds something of the client, and what; nothing is made.
    rows
        A file with texts of its rows, for which --list searches all bytes.
    purge
        Take the client out of FOLDER: delete what is its alone, and put the new folder, which goes up in it, in the
        place of all sums. With --how the new folder is made first; else it is one that was made before.
    basis
        Why, in words that deletions.jsonl holds, such as a law's.
    requested
        The day on which it was asked for, such as 2026-11-30.
    federation
        The folder of the federation that has signed the run's record, at its coordinator; its key signs again.
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
    if list_ or purge:
        _traces(folder, client, list_, rows, purge, how, out, basis, requested, federation, json)
        return
    if client is None:
        raise LichenError("names nobody", where="lichen forget", fix="add --client NAME, a name of roster.json")
    with crash_in(out or folder), redirect_stdout(sys.stderr):
        from lichen.recipes.withdrawal.forget import forget

        numbers = {"every": every, "local": local, "rate": rate, "repair": repair}
        numbers |= {"beta": beta, "alpha": alpha, "gamma": gamma, "rounds": rounds}
        found = forget(folder, client, how=how, out=out, against=against, say=log, **numbers)
    if json:
        print_json(found.as_dict())
        return
    from lichen.present.table import new_table
    from lichen.present.units import score_text, seconds_text
    from lichen.recipes.withdrawal.report import proof_table, proof_words

    heads = ("", "the others' mean", "took")
    table = new_table(None, *heads, numbers=heads[1:])
    table.add_row("the run", score_text(found.before), seconds_text(found.run_seconds))
    table.add_row(f"without {found.client}, {found.how}", score_text(found.after), seconds_text(found.seconds))
    show(table)
    for grid, (copied, why) in found.starts.items():
        say(f"{grid}: {copied} rounds copied; {why}")
    if (measured := proof_table(found.report)) is not None:
        show(measured)
    for line in proof_words(found.report):
        say(line)
    say(f"new folder: {found.new}")


def _traces(
    folder: Path,
    client: str | None,
    list_: bool,
    rows: Path | None,
    purge: bool,
    how: How | None,
    out: Path | None,
    basis: str,
    requested: str,
    federation: Path | None,
    json: bool,
) -> None:
    """List what is left of a client, or take it out of the folder."""
    from lichen.cli_traces import list_traces, purge_run, signer_from

    if list_ and purge:
        raise LichenError("look, or take out", where="--list and --purge", fix="leave out one of them")
    if list_:
        if client is None:
            raise LichenError("names nobody", where="--list", fix="add --client NAME, a name of roster.json")
        list_traces(folder, client, rows=rows, json=json)
        return
    with redirect_stdout(sys.stderr):
        signer = signer_from(federation)
        if how is not None and client is not None and not (folder / ".purge").is_dir():
            from lichen.recipes.withdrawal.forget import forget

            out = forget(folder, client, how=how, out=out, say=log).new
    purge_run(folder, client, out, basis=basis, requested=requested, signer=signer, json=json)
