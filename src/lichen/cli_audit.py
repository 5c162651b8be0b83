"""The commands of who looks into a run with its data at hand: ``audit`` says what it gave away, ``split-audit`` what it
would if its model were cut, ``influence`` which rows have helped it.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path

from lichen.shell import log, print_json, say, show

__all__ = ["audit_command", "influence_command", "split_audit_command"]


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
    from lichen.recipes.stages.folder import last_stage

    folder, *rest = (last_stage(one) for one in (folder, *others))
    if rest:
        _audit_several((folder, *rest), rows=rows, messages=messages, sums=sums, seed=seed, json=json)
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


def split_audit_command(
    folder: Path,
    /,
    *,
    cuts: str | None = None,
    code: str | None = None,
    noise: float | None = None,
    rows: int = 64,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Say how much of its texts a server could read, if a finished run's model were cut and clients held what is below.

    Test rows go through the blocks below each cut, as they were trained; two readers that have seen none of the rows
    name each token from its hidden states alone: the nearest embedding, and a linear decoder fitted on random tokens.

    Parameters
    ----------
    folder
        The run's folder; its data are opened again, and nothing in it changes.
    cuts
        Blocks below each cut, such as 1,2,8; without it a split run's own, else 1, 2, 4 and so on.
    code
        How tokens are coded that cross, such as int8 or topk:64/256,int8; without it as in a split run, else float32.
    noise
        Standard deviation of Gaussian noise on a token, relative to its norm; without it a split run's, else 0.
    rows
        Test rows at most.
    seed
        Of the random tokens and the noise.
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
    from lichen.recipes.audit.crossings import split_audit
    from lichen.recipes.audit.crossings_report import crossings_table, crossings_words, cuts_of

    words = None if code is None else [word.strip() for word in code.split(",") if word.strip()]
    found = split_audit(folder, cuts=cuts_of(cuts or ""), code=words, noise=noise, rows=rows, seed=seed)
    if json:
        from dataclasses import asdict

        print_json({"folder": str(folder), "cuts": [asdict(one) for one in found]})
        return
    show(crossings_table(found))
    for line in crossings_words(found):
        say(line)


def influence_command(
    folder: Path,
    /,
    *,
    client: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Say which training rows of a finished run harm the model on their client's validation rows, and which help it.

    A row with a wrong label mostly harms. Rows and numbers stay here: they are written to a file that only you can
    read, those that harm most first.

    Parameters
    ----------
    folder
        The run's folder; its data are opened again.
    client
        Whose rows; without it those of every client, each held against its own validation rows.
    out
        The file; influence.csv in the run's folder without it.
    json
        Print the rows as JSON, and nothing else, on standard output.
    """
    from lichen.recipes.audit.influence import influence
    from lichen.recipes.stages.folder import last_stage

    folder = last_stage(folder)
    rows = influence(folder, client=client, out=out)
    if json:
        from dataclasses import asdict

        print_json({"folder": str(folder), "rows": [asdict(row) for row in rows]})
        return
    from rich.text import Text

    from lichen.present.table import new_table
    from lichen.present.units import score_text

    heads = ("client", "row", "influence", "label", "text")
    table = new_table("rows that harm most", *heads, numbers=["row", "influence"])
    for row in rows[:10]:
        table.add_row(Text(row.client), str(row.row), score_text(row.influence), Text(row.label), Text(row.text[:60]))
    show(table)
    harmful = sum(row.influence > 0 for row in rows)
    say(f"{harmful} of {len(rows)} training rows raise the loss on their client's validation rows")
    log(f"wrote {out or folder / 'influence.csv'}")
