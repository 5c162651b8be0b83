"""The command ``forget``: a new run beside a finished one, to which a client never came.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

from lichen.shell import crash_in, log, print_json, say, show

__all__ = ["forget_command"]


def forget_command(
    folder: Path,
    /,
    *,
    client: str,
    how: Literal["subtract", "replay", "eraser", "negate", "npo"] | None = None,
    out: Path | None = None,
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

    The old folder stays as it is. The same command goes on after a stop.

    Parameters
    ----------
    folder
        The finished run; its data are opened again.
    client
        Who is to be forgotten: a name of the run's roster.json.
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
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
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
