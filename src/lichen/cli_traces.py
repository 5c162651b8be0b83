"""What ``lichen forget --list`` and ``--purge`` print.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, say, show

if TYPE_CHECKING:
    from lichen.core.files.record import Signer

__all__ = ["list_traces", "purge_run", "signer_from"]


def list_traces(folder: Path, client: str, *, rows: Path | None, json: bool) -> None:
    """Print what a folder holds of a client.

    Args:
        folder: A run's.
        client: A name of its roster.
        rows: A file with texts of its rows.
        json: As JSON.
    """
    from rich.text import Text

    from lichen.present.table import new_table
    from lichen.recipes.withdrawal.traces.listing import traces

    found = traces(folder, client, rows=rows)
    if json:
        print_json({"folder": str(folder), **found.as_dict()})
        return
    heads = ["file", "what it is", "holds of the client", "name", *(["texts"] if rows is not None else [])]
    table = new_table(f"{folder}: what is left of {client}", *heads, numbers=heads[4:])
    for one in found.files:
        holds = ", ".join(one.holds)
        cells = [one.file, one.what, f"{holds}: its alone" if one.alone else holds, "found" if one.named else ""]
        table.add_row(*map(Text, cells), *([Text(str(one.texts))] if rows is not None else []))
    show(table)
    say(f"{len(found.files)} files; {found.nothing} others hold nothing of it")
    if not found.searched:
        say("its name is too short to search bytes for: what a file holds of it is known by the file's kind")
    for line in found.outside:
        say(f"elsewhere  {line}")


def purge_run(
    folder: Path,
    client: str | None,
    new: Path | None,
    *,
    basis: str,
    requested: str,
    signer: Signer | None,
    json: bool,
) -> None:
    """Take a client out of a run's folder, and print what was done.

    Args:
        folder: The run's.
        client: A name of its roster; None ends a purge that was stopped.
        new: The run without it; None: the one beside it that was made by forgetting.
        basis: Why.
        requested: The day on which it was asked for.
        signer: Whose key signs; None: the run's own.
        json: As JSON.

    Raises:
        LichenError: if nobody is named, and no purge was stopped.
    """
    from lichen.recipes.artifacts.withdrawn.deletions import PENDING
    from lichen.recipes.withdrawal.traces.listing import name_in
    from lichen.recipes.withdrawal.traces.purge import end_purge, purge

    if client is None or (folder / PENDING).is_dir():
        found = end_purge(folder, say=log)
    else:
        name_in(folder, client)
        new = new or without_folder(folder, client)
        found = purge(folder, client, new, basis=basis, requested=requested, signer=signer, say=log)
    if json:
        print_json(found.as_dict())
        return
    say(f"{folder}: one client is now {found.instead}; {found.changed} files changed, {found.removed} removed")
    say(f"receipt    {found.receipt}")
    say("           give it to whoever has gone: with it and the name they find their line. It lies nowhere else")
    for command in found.again:
        say(f"make anew  {command}")
    for name in found.left:
        say(f"look at    {folder / name}: the name is a word in it still, of something else or of a path")


def without_folder(folder: Path, client: str) -> Path:
    """The finished run without a client that lies beside a run.

    Raises:
        LichenError: if there is none, or several.
    """
    from lichen.recipes.withdrawal.traces.purge import is_without

    if is_without(folder, client):
        return folder
    here = folder.absolute()
    siblings = sorted(one for one in here.parent.glob("*") if one.name.startswith(f"{here.name}-") and one.is_dir())
    found = [one for one in siblings if is_without(one, client)]
    if len(found) != 1:
        what = f"{len(found) or 'no'} finished runs without {client!r} lie beside it"
        fix = f"make one: lichen forget {folder} --client NAME; or name it with --out"
        raise LichenError(what, where=str(folder), fix=fix)
    return found[0]


def signer_from(federation: Path | None) -> Any:
    """The key of a federation's server; None where none is named."""
    if federation is None:
        return None
    from lichen.federation.kits.members import read_federation, signer_of

    return signer_of(read_federation(federation))
