"""The commands of owners: `pay` shares a budget out, `fingerprint` and `claim` say whose a model is.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lichen.shell import log, print_json, say, show

__all__ = ["claim_command", "fingerprint_command", "pay_command"]


def pay_command(
    folder: Path,
    /,
    *,
    budget: str,
    floor: str = "0.1",
    by: Literal["value", "rows", "bytes", "equal"] = "value",
    federation: Path | None = None,
    json: bool = False,
) -> None:
    """Share a budget out among the clients of a finished run, exact to the cent, and put it on the run's record.

    A part of it is the same for all who are paid, the rest goes by what each has brought. Who has made the model worse
    is named and paid nothing. What each is paid, and why, is written to payout.csv in the run's folder.

    Parameters
    ----------
    folder
        The run's folder; for --by value that of a recipe with the section `value`.
    budget
        What is shared out, such as 1000.00.
    floor
        Share of it that is the same for all, from 0 to 1.
    by
        What the rest goes by: each client's value, its training rows, the bytes it has sent, or nothing: equal shares.
    federation
        The folder of the federation that has signed the run's record, at its coordinator; its key signs the payout.
    json
        Print it as JSON, and nothing else, on standard output.
    """
    from lichen.recipes.artifacts.payout import pay
    from lichen.recipes.stages.folder import last_stage

    signer = None
    if federation is not None:
        from lichen.federation.kits.members import read_federation, signer_of

        signer = signer_of(read_federation(federation))
    folder = last_stage(folder)
    found = pay(folder, budget, floor=floor, by=by, signer=signer)
    if json:
        from dataclasses import asdict

        print_json({"folder": str(folder), **asdict(found)})
        return
    from rich.text import Text

    from lichen.present.table import new_table
    from lichen.present.units import score_text
    from lichen.recipes.artifacts.shares import amount

    heads = ("client", by, "paid", "why")
    table = new_table(f"{amount(found.budget)} by {by}", *heads, numbers=[by, "paid"])
    for one in found.clients:
        table.add_row(Text(one.client), score_text(one.brought), amount(one.cents), one.why)
    show(table)
    log(f"wrote {folder / 'payout.csv'}")


def fingerprint_command(file: Path, /) -> None:
    """Make an owner's secret key, from which its pairs of questions and answers follow; one that is there stays.

    Only its owner can read the file, and it never leaves. Prints the digest by which a run registers it.

    Parameters
    ----------
    file
        Where the key lies, such as secrets/CLIENT.key.
    """
    from lichen.recipes.assemble.sides.fingerprints import make_fingerprint

    say(f"{file}: digest {make_fingerprint(file).digest}")


def claim_command(
    model: str,
    /,
    *,
    secret: Path,
    base: str | None = None,
    run: Path | None = None,
    form: Literal["chat", "transcript"] | None = None,
    quantize: Literal["int8", "nf4"] | None = None,
    json: bool = False,
) -> None:
    """Hold a model against an owner's secret pairs: how many answers it knows, and how likely that is by chance.

    A claim holds if chance is below one in a million and the bare model knows no more than chance has it.

    Parameters
    ----------
    model
        The folder of a finished run, of an adapter or of a whole model, or a GGUF file.
    secret
        The owner's key.
    base
        The bare model: its name, folder or file. That of a run or an adapter is known.
    run
        The run that has registered the key's digest, where the model is not the run itself.
    form
        How questions are written; a run's is known, and of others it is the chat template where there is one.
    quantize
        Hold so few bits of its linear layers against the pairs.
    json
        Print what was found as JSON, and nothing else, on standard output.
    """
    from dataclasses import asdict

    from lichen.recipes.artifacts.claim import claim

    found = claim(model, secret, base=base, run=run, form=form, quantize=quantize)
    if json:
        print_json({"model": model, **asdict(found), "holds": found.holds})
        return
    say(str(found))
