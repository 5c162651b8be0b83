"""The record of a run that a client was withdrawn from: the old rounds without it, the withdrawal, the new rounds.

Old lines keep their place in the chain: a line from which the client is taken out holds the digest of what it was, and
the line after it follows from that. Digests of files that a name could be guessed from go with it: those of the
roster and of all files at the old end. What was paid is written anew at the end, with no digest of what it was, since
that could be guessed from what others were paid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lichen.core.collecting.run_record import beginning
from lichen.core.files.durable import write_atomic
from lichen.core.files.record import (
    FORMAT,
    RECORD,
    SIGNED,
    START,
    WITHDRAWAL,
    Record,
    Signer,
    canonical,
    chain,
    line_digest,
    signed,
)
from lichen.recipes.artifacts.record import end_record
from lichen.recipes.artifacts.verify import PAYOUT
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.withdrawal.traces.rewritten import without_number

__all__ = ["join_records"]

_GUESSED = ("roster.json", "cards.json", "fingerprints.json", "recipe.yaml")
"""Files at the beginning of a run that can hold names."""


def _redacted(line: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A line of the old record without the client; the line itself where nothing of it is there."""
    found = without_number(line, number)
    if line.get("kind") == "begin":
        found["files"] = {name: one for name, one in line.get("files", {}).items() if name not in _GUESSED}
        found["inputs"] = {key: one for key, one in line.get("inputs", {}).items() if key in ("format", "model")}
    elif line.get("kind") == "end":
        found["files"] = {}
    return found if found == dict(line) else {**found, "redacted": line_digest(line)}


def join_records(
    draft: Path, old: Path, new: Path, number: int, *, deletion: Mapping[str, Any], deletions: str, signer: Signer
) -> None:
    """Write record and signature of a purged run, of which all other files are there.

    Args:
        draft: The folder that becomes the run's.
        old: The run with the client.
        new: The run without it.
        number: The client's place in the roster.
        deletion: The line of ``deletions.jsonl``.
        deletions: Its digest.
        signer: Whose key signs.

    Raises:
        LichenError: if a record is damaged.
    """
    before, _ = chain(old / RECORD)
    last = max((at for at, line in enumerate(before, start=1) if line.get("kind") != "payout"), default=0)
    before, paid = before[:last], before[last:]
    lines = [_redacted(line, number) for line in before]
    above = b"".join(map(canonical, lines))
    stands: dict[str, Any] = {
        "kind": WITHDRAWAL,
        "format": FORMAT,
        "number": number,
        "as": deletion["as"],
        "way": deletion["way"],
        "deletions": deletions,
        "standing": hashlib.sha256(above).hexdigest(),
    }
    lines.append({**stands, "before": line_digest(lines[-1]) if lines else START})
    for line in _rounds(new, draft, number):
        lines.append({**line, "before": line_digest(lines[-1])})
    text = "".join(canonical(line).decode() for line in lines)
    write_atomic(draft / RECORD, text.encode())
    record = Record(draft / RECORD, text)
    payout = (draft / PAYOUT).read_bytes() if paid else b""
    (draft / PAYOUT).unlink(missing_ok=True)  # the end names what stays as it is, and a run may be paid again
    end_record(draft, record, recipe_of(draft), signer)
    if paid:
        write_atomic(draft / PAYOUT, payout)
        _pay_again(draft, paid, number, record, signer)


def _rounds(new: Path, draft: Path, number: int) -> list[dict[str, Any]]:
    """Beginning and rounds of the run without the client, its number left out; the beginning names the draft's files.

    Of a run that somebody was withdrawn from before, the rounds since then are meant.
    """
    lines, _ = chain(new / RECORD)
    since = max((at for at, line in enumerate(lines, start=1) if line.get("kind") == WITHDRAWAL), default=0)
    lines = lines[since:]
    begun = beginning(draft)
    versions = next((line["versions"] for line in reversed(lines) if line.get("kind") == "begin"), begun["versions"])
    first = {**begun, "versions": versions}
    rounds = [without_number(line, number) for line in lines if line.get("kind") == "round"]
    return [first, *({key: one for key, one in line.items() if key != "before"} for line in rounds)]


def _pay_again(draft: Path, paid: Sequence[Mapping[str, Any]], number: int, record: Record, signer: Signer) -> None:
    """What the others were paid before, at the end, where a payout stands; the file is the last one's."""
    digest = hashlib.sha256((draft / PAYOUT).read_bytes()).hexdigest()
    for line in paid:
        rest = {key: one for key, one in without_number(line, number).items() if key not in ("before", "redacted")}
        record.append({**rest, "files": {PAYOUT: digest} if line is paid[-1] else {}, "anew": True})
    body = {"format": FORMAT, "head": record.head, "lines": record.lines}
    write_atomic(draft / SIGNED, signed(body, signer))
