"""Holds a run's folder against its record, and an adapter's against its manifest.

What is proven: no line of the record, and no file that it names, is another than when the key's owner signed it. What
is not: see :data:`UNPROVEN`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lichen.core.contracts.value import RoundValue
from lichen.core.errors import LichenError
from lichen.core.files.manifest import files_in, sha256_of
from lichen.core.files.record import (
    RECORD,
    SIGNED,
    WITHDRAWAL,
    canonical,
    chain,
    public_key,
    recorded_files,
    require_signed,
)
from lichen.core.visible import visible
from lichen.recipes.artifacts.contributions import CONTRIBUTIONS, read_contributions
from lichen.recipes.artifacts.withdrawn.deletions import DELETIONS, require_deletions, require_whole
from lichen.recipes.stages.folder import last_stage

__all__ = ["KEY", "MANIFEST", "PAYOUT", "handed_on", "verify"]

MANIFEST = "MANIFEST.json"
"""Beside an adapter: its files, its base and the record it came from, signed."""

PAYOUT = "payout.csv"
"""What each client was paid."""

KEY = Path("state", "record.key")
"""The private key of a run."""

UNPROVEN = (
    "that the key belongs to whoever it should: compare the public key with one you were given by another way",
    "that the owner of the key has not written record and files anew and signed them again",
    "that clients learned from the rows that they say, or from rows at all",
)
"""What a record that holds does not prove."""

WITHDRAWN = (
    "what stood of a withdrawn client in redacted lines of the record: of such a line the digest is left",
    "that no copy of what was deleted lies elsewhere, nor on the disk under what was written since",
)
"""What a record does not prove besides, where a client was withdrawn."""

_PUT_BACK = "put it back from a copy"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What holds of a folder.

    Attributes:
        key: Public key that has signed it, 64 hex digits; empty where nothing is signed yet.
        federation: The federation whose server has that key, as it says; empty: the run's own key.
        lines: Of the record; 0 for an adapter by itself.
        rounds: Rounds on record that made the model; those before a withdrawal did not.
        messages: Messages that counted in them.
        values: Values of clients in rounds, each as the record has it.
        payouts: Times that the clients were paid.
        withdrawn: Clients that were taken out of the run.
        redacted: Lines of the record from which they were taken out.
        files: Files that are as they were recorded.
        others: Files that no record names.
        unproven: What does not follow from it.
    """

    key: str
    federation: str = ""
    lines: int = 0
    rounds: int = 0
    messages: int = 0
    values: int = 0
    payouts: int = 0
    withdrawn: int = 0
    redacted: int = 0
    files: int = 0
    others: tuple[str, ...] = ()
    unproven: tuple[str, ...] = UNPROVEN

    def __str__(self) -> str:
        whose = f"the key of the federation {self.federation}" if self.federation else "the run's own key"
        lines = [f"signed    {f'by {self.key}, {whose}' if self.key else 'not yet'}"]
        if self.lines:
            counts = f"{self.lines} lines, {self.rounds} rounds, {self.messages} messages that counted"
            lines.insert(0, f"record    {counts}: whole, in order")
        if self.values:
            lines.append(f"values    {self.values} of clients in rounds: {CONTRIBUTIONS} has those on record")
        if self.payouts:
            lines.append(f"payouts   {self.payouts}: {PAYOUT} is the last on record")
        if self.withdrawn:
            left = f"nothing of their own is left, and {self.redacted} lines of the record are redacted"
            lines.append(f"withdrawn {self.withdrawn}, as {DELETIONS} says: {left}")
        if self.key:
            lines.append(f"files     {self.files}, each as it was when it was signed")
        return "\n".join([*lines, *(f"unproven  {one}" for one in self.unproven)])


def handed_on(adapter: Path) -> list[str]:
    """The files of an adapter's folder that its manifest names."""
    return files_in(adapter, but=(MANIFEST, "."))


def verify(folder: Path | str, *, key: str | None = None) -> Verified:
    """Hold a run's folder against its record, or an adapter's against its manifest.

    Args:
        folder: Either.
        key: The public key that it must be signed with, 64 hex digits; None: whichever it is signed with.

    Raises:
        LichenError: naming the first file, and its line in a record, that is not as it was.
    """
    folder = last_stage(folder)
    if key is not None and (len(key) != 64 or set(key) - set("0123456789abcdef")):
        raise LichenError(f"{key!r} is no public key", where="--key", fix="use the 64 hex digits that verify prints")
    if (folder / MANIFEST).is_file():
        body = require_signed(folder / MANIFEST, key)
        names = _files(folder / MANIFEST, body)
        for name in names:
            _require(folder, name, names[name], str(folder / MANIFEST))
        others = tuple(name for name in handed_on(folder) if name not in names)
        return Verified(key=body["public_key"], federation=_federation(body), files=len(names), others=others)
    if not (folder / RECORD).is_file():
        what = "has no record" if (folder / "recipe.yaml").exists() else "is no folder of a run, nor of its adapter"
        fix = "a run that was begun with this version writes one" if "record" in what else "name a run's folder"
        raise LichenError(what, where=str(folder), fix=fix)
    return _verify_run(folder, key)


def _verify_run(run: Path, key: str | None) -> Verified:
    require_whole(run)
    every, head = chain(run / RECORD)
    since = max((at for at, line in enumerate(every, start=1) if line.get("kind") == WITHDRAWAL), default=0)
    lines = every[since:]  # what made the files as they are now
    rounds = [line for line in lines if line.get("kind") == "round"]
    messages = sum(len(line["counted"]) for line in rounds)
    if not lines or lines[0].get("kind") != "begin":
        raise LichenError("is no beginning", where=f"{run / RECORD}, line {since + 1}", fix=_PUT_BACK)
    last = next((at for at, line in enumerate(lines) if line.get("kind") == "end"), len(lines) - 1)
    end, payouts = lines[last], lines[last + 1 :]
    if not (run / SIGNED).exists() and end.get("kind") != "end":
        if key is not None:
            raise LichenError("is not finished, and not signed yet", where=str(run), fix="verify it when it is")
        unsigned = ("anything: the run is not finished, and nothing is signed yet", *UNPROVEN)
        return Verified(key="", lines=len(lines), rounds=len(rounds), messages=messages, unproven=unsigned)
    about = require_signed(run / SIGNED, key)
    if about["head"] != head or about["lines"] != len(every):
        raise LichenError(
            f"is not the record of {about['lines']} lines that was signed", where=str(run / RECORD), fix=_PUT_BACK
        )
    _require_signer(run, about, end)
    names = _files(run / RECORD, end)
    for name, digest in names.items():
        _require(run, name, digest, f"{run / RECORD}, line {since + last + 1}")
    for name, digest in _files(run / RECORD, payouts[-1]).items() if payouts else ():
        _require(run, name, digest, f"{run / RECORD}, line {len(every)}")
        names[name] = digest
    values = _require_values(run, rounds)
    for number, state in _last_states(lines):
        column = run / "state" / lines[number - 1]["column"] / "server.safetensors"
        if column.exists() and sha256_of(column)[:32] != state:
            raise LichenError(f"is another state than that of line {since + number}", where=str(column), fix=_PUT_BACK)
    withdrawn, files = require_deletions(run, every), len(names)
    if (run / "adapter" / MANIFEST).exists():
        body = require_signed(run / "adapter" / MANIFEST, about["public_key"])
        if body["record"] != hashlib.sha256(canonical(end)).hexdigest() or _federation(body) != _federation(about):
            raise LichenError("is of another run", where=str(run / "adapter" / MANIFEST), fix=_PUT_BACK)
        files += 1
    elif (run / "adapter").is_dir():
        raise LichenError("is missing", where=str(run / "adapter" / MANIFEST), fix=_PUT_BACK)
    others = tuple(name for name in recorded_files(run) if name not in names)
    return Verified(
        key=about["public_key"],
        federation=_federation(about),
        lines=len(every),
        rounds=len(rounds),
        messages=messages,
        withdrawn=withdrawn,
        redacted=sum("redacted" in line for line in every),
        unproven=(*UNPROVEN, *WITHDRAWN) if withdrawn else UNPROVEN,
        values=values,
        payouts=len(payouts),
        files=files,
        others=others,
    )


def _require_values(run: Path, rounds: Iterable[Mapping[str, Any]]) -> int:
    """How many values of clients the record has; those of the column that was kept stand in their file as well."""
    if not any("value" in line for line in rounds):
        return 0
    found = read_contributions(run)
    try:
        recorded = {
            int(line["round"]): RoundValue.load(line["value"])
            for line in rounds
            if line["column"] == found.column and "value" in line
        }
    except (KeyError, TypeError, ValueError):
        raise LichenError("has a value that cannot be read", where=str(run / RECORD), fix=_PUT_BACK) from None
    if recorded != dict(found.rounds):
        raise LichenError("has other values than the record", where=str(run / CONTRIBUTIONS), fix=_PUT_BACK)
    return sum(len(one.value) for one in recorded.values())


def _federation(body: Mapping[str, Any]) -> str:
    return visible(str(body.get("federation", "")))


def _require_signer(run: Path, about: Mapping[str, Any], end: Mapping[str, Any]) -> None:
    """Refuse a head that is signed with another key than the record's last line names, or than the run has."""
    named = end.get("public_key", about["public_key"])  # records of earlier versions name none
    if (named, _federation(end)) != (about["public_key"], _federation(about)):
        whose = f"the federation {_federation(end)}" if _federation(end) else "the run"
        what = f"is signed with the key {about['public_key'][:16]}..., and the record names {named[:16]}... of {whose}"
        raise LichenError(what, where=str(run / SIGNED), fix=_PUT_BACK)
    if not _federation(about) and public_key(run / KEY) != about["public_key"]:
        raise LichenError("is not the key that has signed", where=str(run / KEY), fix=_PUT_BACK)


def _last_states(lines: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """``(line, digest)`` of the newest round of every column."""
    last: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines, start=1):
        if line.get("kind") == "round":
            last[line["column"]] = number, line["state"]
    return iter(last.values())


def _files(where: Path, body: Mapping[str, Any]) -> dict[str, str]:
    """The files that a signed body names; none of them lies elsewhere."""
    names = body.get("files")
    if not isinstance(names, dict) or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise LichenError("names no files of its folder", where=str(where), fix=_PUT_BACK)
    return {str(name): str(digest) for name, digest in names.items()}


def _require(folder: Path, name: str, digest: str, source: str) -> None:
    try:
        found = sha256_of(folder / name)
    except OSError:
        raise LichenError(f"is missing or cannot be read; {source} names it", where=str(folder / name)) from None
    if found != digest:
        raise LichenError(f"is another file than {source} says", where=str(folder / name), fix=_PUT_BACK)
