"""The command ``audit``: attacks a finished run, and says what it gave away.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path

from lichen.shell import print_json, say, show

__all__ = ["audit_command"]


def audit_command(
    folder: Path,
    /,
    *others: Path,
    rows: int = 1000,
    messages: int = 8,
    sums: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Attack a finished run with its own data at hand: who was trained on, and what text its messages give away.

    Membership is told by losses, with and without the bare model's as a reference. Text is looked for in the messages
    that a run with federation.history: true has retained. Of a run with canaries (the section audit of its recipe) it
    is guessed which it was trained on, and so how large its epsilon is at least. Several runs on the same data make
    one table, a line each.

    Parameters
    ----------
    folder
        The run's folder.
    others
        Folders of more runs on the same data, such as one with privacy.
    rows
        Training rows, and test rows, of a run that are scored at most.
    messages
        Messages of a run that are read at most.
    sums
        Read the sum of each round in place of its messages: all that masks would leave the server to see.
    seed
        Of the draws behind the intervals.
    json
        Print what was found as JSON, and nothing else, on standard output; a list where there are several runs.
    """
    from dataclasses import asdict

    from lichen.recipes.audit.audit import audit
    from lichen.recipes.audit.report import (
        canaries_table,
        canaries_words,
        members_table,
        members_words,
        messages_table,
        messages_words,
    )

    if others:
        _audit_several((folder, *others), rows=rows, messages=messages, sums=sums, seed=seed, json=json)
        return
    found = audit(folder, rows=rows, messages=messages, sums=sums, seed=seed)
    if json:
        print_json({"folder": str(folder), **asdict(found)})
        return
    show(members_table(found))
    say(members_words(found))
    if found.canaries is not None:
        show(canaries_table(found.canaries))
        for line in canaries_words(found.canaries):
            say(line)
    if found.messages:
        show(messages_table(found))
    for line in messages_words(found):
        say(line)


def _audit_several(folders: tuple[Path, ...], *, rows: int, messages: int, sums: bool, seed: int, json: bool) -> None:
    from dataclasses import asdict

    from lichen.recipes.audit.report import runs_table, runs_words
    from lichen.recipes.audit.several import audit_several

    runs = audit_several(folders, rows=rows, messages=messages, sums=sums, seed=seed)
    if json:
        about = [{"folder": x.folder, "protected_by": x.protected_by, "epsilon": x.epsilon} for x in runs]
        print_json([{**each, **asdict(run.found)} for each, run in zip(about, runs, strict=True)])
        return
    show(runs_table(runs))
    for line in runs_words(runs):
        say(line)
