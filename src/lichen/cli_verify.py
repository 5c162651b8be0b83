"""The command ``verify``: holds a run's folder, or an adapter's, against its record.

Nothing heavy is imported until it is called.
"""

from __future__ import annotations

from pathlib import Path

from lichen.core.errors import LichenError
from lichen.shell import log, print_json, say

__all__ = ["verify_command"]


def verify_command(
    folder: Path,
    /,
    *,
    key: str | None = None,
    federation: Path | None = None,
    receipt: str | None = None,
    client: str | None = None,
    json: bool = False,
) -> None:
    """Find any byte that was changed since a run was signed: in its record, its recipe, its state, its adapter.

    Says also what is not proven. The first change ends it with exit code 2, and names the file and the line.

    Parameters
    ----------
    folder
        A run's folder, or an adapter's by itself.
    key
        The public key that must have signed it: 64 hex digits, as a former verify printed them.
    federation
        The folder of a federation, at its coordinator: the key of its server's kit must have signed.
    receipt
        What the purge of a client has shown: with the client's name it finds the line about it in deletions.jsonl.
    client
        The name that the client had, for --receipt.
    json
        Print what holds as JSON, and nothing else, on standard output.
    """
    from dataclasses import asdict

    from lichen.recipes.artifacts.verify import verify
    from lichen.recipes.stages.folder import last_stage

    if federation is not None:
        from lichen.federation.kits.members import key_of

        if key is not None:
            raise LichenError("says the key once more", where="--key", fix="leave out one of --key and --federation")
        key = key_of(federation)
    if (receipt is None) != (client is None):
        raise LichenError("go together", where="--receipt and --client", fix="give both, or none")
    folder = last_stage(folder)
    found = verify(folder, key=key)
    line = None
    if receipt is not None and client is not None:
        from lichen.recipes.artifacts.withdrawn.deletions import whose

        line = whose(folder, receipt, client)
    if json:
        print_json({"folder": str(folder), **asdict(found), **({"deletion": line} if line else {})})
        return
    for name in found.others:
        log(f"no record names {folder / name}: it was put there later")
    say(str(found))
    if line is not None:
        when = f", asked for on {line['asked']}" if line["asked"] else ""
        say(f"receipt   {client} is {line['as']}: withdrawn on {line['done']}{when}, by {line['way']}")
