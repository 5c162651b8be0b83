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
    how: Literal["subtract", "replay"] | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Forget a client of a finished run: a new folder with the model of a run to which it never came.

    The old folder stays as it is. The same command goes on after a stop.

    Parameters
    ----------
    folder
        The finished run; its data are opened again.
    client
        Who is to be forgotten: a name of the run's roster.json.
    how
        subtract: its statistics are taken off the sums of task oneshot; replay: the others train again from the last
        state that does not depend on it. By default subtract where that is all there is, else replay.
    out
        The new folder; FOLDER-without-CLIENT if not given.
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
    with crash_in(out or folder), redirect_stdout(sys.stderr):
        from lichen.recipes.withdrawal.forget import forget

        found = forget(folder, client, how=how, out=out, say=log)
    if json:
        print_json(found.as_dict())
        return
    from lichen.present.table import new_table
    from lichen.present.units import score_text, seconds_text

    heads = ("", "the others' mean", "took")
    table = new_table(None, *heads, numbers=heads[1:])
    table.add_row("the run", score_text(found.before), seconds_text(found.run_seconds))
    table.add_row(f"without {found.client}, {found.how}", score_text(found.after), seconds_text(found.seconds))
    show(table)
    for rate, (rounds, why) in found.starts.items():
        say(f"{rate}: {rounds} rounds copied; {why}")
    say(f"new folder: {found.new}")
