"""The command ``forget``: a new run to which a client never came, what a run holds of it, and taking that out.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lichen.core.errors import LichenError
from lichen.recipes.withdrawal.options import How  # the command line reads it
from lichen.shell import crash_in, log, print_json, say, show

if TYPE_CHECKING:
    from lichen.recipes.withdrawal.forget import Forgotten

__all__ = ["forget_command"]


def forget_command(
    folder: Path,
    /,
    *,
    client: str | None = None,
    site: str | None = None,
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
        The finished run; its data are opened again. With --site the folder of a federation.
    client
        Who is to be forgotten: a name of the run's roster.json. Without it --purge ends a purge that was stopped.
    site
        A site of the federation in FOLDER that has withdrawn: it is asked for nothing more, and the runs that were made
        with it are listed. Sites that call lichen withdraw are entered by themselves.
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
    numbers = {"every": every, "local": local, "rate": rate, "repair": repair}
    numbers |= {"beta": beta, "alpha": alpha, "gamma": gamma, "rounds": rounds}

    def make() -> Forgotten:
        from lichen.recipes.withdrawal.forget import forget

        return forget(folder, str(client), how=how, out=out, against=against, say=log, **numbers)

    if list_ and purge:
        raise LichenError("look, or take out", where="--list and --purge", fix="leave out one of them")
    _refuse_idle(
        {
            "--rows": (rows is not None and not list_, "add --list"),
            "--basis": (bool(basis) and not purge, "add --purge"),
            "--asked": (bool(requested) and not purge, "add --purge"),
            "--federation": (federation is not None and not purge, "add --purge"),
            "--against": (against is not None and (list_ or (purge and how is None)), "add --how"),
            "--how": (how is not None and list_, "leave it out"),
            "--out": (out is not None and list_, "leave it out"),
            **{
                f"--{name}": (value is not None and how is None, "add --how eraser, negate or npo")
                for name, value in numbers.items()
            },
        }
    )
    if site is not None:
        if client is not None or how is not None or out is not None or list_ or purge:
            fix = "give --site alone; a client of a run is forgotten by --client"
            raise LichenError("is for a federation, and nothing beside it", where="--site", fix=fix)
        from lichen.cli_withdraw import forget_site

        forget_site(folder, site, json=json)
        return
    if list_ or purge:
        from lichen.cli_traces import list_traces, purge_run, signer_from
        from lichen.recipes.artifacts.withdrawn.deletions import PENDING
    if purge:
        with crash_in(folder), redirect_stdout(sys.stderr):
            signer = signer_from(federation)
            if how is not None and client is not None and not (folder / PENDING).is_dir():
                out = make().new
        purge_run(folder, client, out, basis=basis, requested=requested, signer=signer, json=json)
        return
    if client is None:
        raise LichenError("names nobody", where="lichen forget", fix="add --client NAME, a name of roster.json")
    if list_:
        list_traces(folder, client, rows=rows, json=json)
        return
    with crash_in(out or folder), redirect_stdout(sys.stderr):
        found = make()
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


def _refuse_idle(idle: dict[str, tuple[bool, str]]) -> None:
    """Refuse a flag that would do nothing, each with what to do."""
    for flag, (given, fix) in idle.items():
        if given:
            raise LichenError("does nothing here", where=flag, fix=fix)
