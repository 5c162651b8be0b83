"""The command ``audit``: attacks a finished run, and says what it gave away.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path

from lichen.shell import print_json, say, show

__all__ = ["audit_command"]


def audit_command(folder: Path, /, *, rows: int = 1000, messages: int = 8, seed: int = 0, json: bool = False) -> None:
    """Attack a finished run with its own data at hand: who was trained on, and what text its messages give away.

    Membership is told by losses, with and without the bare model's as a reference. Text is looked for in the messages
    that a run with federation.history: true has retained.

    Parameters
    ----------
    folder
        The run's folder.
    rows
        Training rows, and test rows, that are scored at most.
    messages
        Messages that are read at most.
    seed
        Of the draws behind the intervals.
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
    from dataclasses import asdict

    from lichen.recipes.audit.audit import audit
    from lichen.recipes.audit.report import members_table, members_words, messages_table, messages_words

    found = audit(folder, rows=rows, messages=messages, seed=seed)
    if json:
        print_json({"folder": str(folder), **asdict(found)})
        return
    show(members_table(found))
    say(members_words(found))
    if found.messages:
        show(messages_table(found))
    for line in messages_words(found):
        say(line)
