"""``deletions.jsonl``: a line for each client that was withdrawn from a run, chained, and signed with the run's record.

A line names the client by its new name and by a digest of a salt and its old one. The salt is the receipt: it is shown
once, and lies nowhere. Whoever has it and knows the name can show that the line is about it; whoever has only the
folder cannot try names. Digests of files as they were before are salted too, for a file such as the roster could be
guessed from its digest.

Reference:
    Stuart Haber and W. Scott Stornetta. "How to Time-Stamp a Digital Document." Journal of Cryptology, 1991.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lichen.core.errors import LichenError
from lichen.core.files.manifest import files_in, sha256_of
from lichen.core.files.record import WITHDRAWAL, chain
from lichen.recipes.artifacts.withdrawn.kinds import client_of

__all__ = [
    "DELETIONS",
    "PENDING",
    "refuse_withdrawn",
    "require_deletions",
    "require_whole",
    "salted",
    "salted_file",
    "whose",
    "withdrawn_numbers",
]

DELETIONS = "deletions.jsonl"

PENDING = ".purge"
"""Within a run's folder: the files of a purge that was begun; whoever calls it again ends it."""

_BLOCK = 1 << 20
_PUT_BACK = "put it back from a copy"
_ANEW = "start a new run on the rows of the others: lichen run RECIPE"


def salted(salt: str, data: bytes) -> str:
    """A digest that nobody can try guesses against who has not the salt.

    >>> salted("00" * 32, b"ada")[:16]
    'f511103a4f5f1125'
    """
    return hmac.digest(bytes.fromhex(salt), data, hashlib.sha256).hex()


def salted_file(salt: str, path: Path) -> str:
    """:func:`salted` of a file's bytes.

    Raises:
        OSError: if it cannot be read.
    """
    found = hmac.new(bytes.fromhex(salt), digestmod=hashlib.sha256)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def require_whole(run: Path) -> None:
    """Refuse a folder in which a purge was stopped half way.

    Raises:
        LichenError: if it is one.
    """
    if (run / PENDING).is_dir():
        what = "a purge of it was stopped, and has to end before anything else"
        raise LichenError(what, where=str(run), fix=f"end it: lichen forget {run} --purge")


def refuse_withdrawn(run: Path, *, fix: str = _ANEW) -> None:
    """Refuse to read rows for a run that a client was withdrawn from, as its rows are no more those it was made from.

    Args:
        run: The run's folder.
        fix: What to do in place of that.

    Raises:
        LichenError: if the folder is such a run's, or a purge of it was stopped.
    """
    require_whole(run)
    if (run / DELETIONS).is_file():
        what = "a client was withdrawn from it, and with that client rows that going on or scoring anew would need"
        raise LichenError(what, where=str(run), fix=fix)


def withdrawn_numbers(run: Path) -> frozenset[int]:
    """The numbers of the clients that were withdrawn from a run."""
    return frozenset(int(line["number"]) for line in chain(run / DELETIONS)[0])


def whose(run: Path, receipt: str, client: str) -> Mapping[str, Any]:
    """The line of a withdrawn client.

    Args:
        run: A run's folder.
        receipt: What the purge has shown: 64 hex digits.
        client: The name that it had.

    Raises:
        LichenError: if no line is about it.
    """
    if len(receipt) != 64 or set(receipt) - set("0123456789abcdef"):
        raise LichenError("is no receipt", where="--receipt", fix="use the 64 hex digits that the purge has shown")
    lines, _ = chain(run / DELETIONS)
    mark = salted(receipt, client.encode("utf-8", "surrogatepass"))
    for line in lines:
        if hmac.compare_digest(str(line.get("who")), mark):
            return line
    raise LichenError(
        f"no line is about a client {client!r} with this receipt",
        where=str(run / DELETIONS),
        fix="use name and receipt exactly as they were",
    )


def require_deletions(run: Path, lines: Sequence[Mapping[str, Any]]) -> int:
    """Hold ``deletions.jsonl`` against a run's record and its files; how many clients were withdrawn.

    Args:
        run: The run's folder.
        lines: Of its record, whose own chain holds.

    Raises:
        LichenError: if the two do not fit together, a file is another than after the purge, or something of a
            withdrawn client is left.
    """
    stands = [line for line in lines if line.get("kind") == WITHDRAWAL]
    if not stands and not (run / DELETIONS).exists():
        return 0
    deletions, head = chain(run / DELETIONS)
    try:
        if not stands or [line["deletions"] for line in stands][-1] != head or len(stands) != len(deletions):
            raise LichenError("is not what the run's record names", where=str(run / DELETIONS), fix=_PUT_BACK)
        numbers = {int(line["number"]) for line in deletions}
        after = {str(name): both[1] for name, both in deletions[-1]["files"].items() if both[1] is not None}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise LichenError("has a line that cannot be read", where=str(run / DELETIONS), fix=_PUT_BACK) from None
    for name, digest in after.items():
        if not (run / name).is_file() or sha256_of(run / name) != digest:
            what = f"is missing, or another file than {DELETIONS} says"
            raise LichenError(what, where=str(run / name), fix=_PUT_BACK)
    for name in files_in(run):
        if client_of(name) in numbers:
            what = "is of a client that was withdrawn"
            raise LichenError(what, where=str(run / name), fix="remove it")
    for at, line in enumerate(lines, start=1):
        counted = {one[0] for one in line.get("counted", ())}
        if numbers & counted:
            what = "has a message of a client that was withdrawn"
            raise LichenError(what, where=f"{run}, line {at} of the record", fix=_PUT_BACK)
    return len(deletions)
