"""The command ``pay``: shares a budget out among the clients of a finished run.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lichen.shell import log, print_json, show

__all__ = ["pay_command"]


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

    signer = None
    if federation is not None:
        from lichen.federation.kits.members import read_federation, signer_of

        signer = signer_of(read_federation(federation))
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
