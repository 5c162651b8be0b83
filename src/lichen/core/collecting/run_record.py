"""What the record of a run says: its beginning, its rounds, its end.

==========  ==================================================================================================
kind        what the line holds
==========  ==================================================================================================
``begin``   digests of recipe, roster, data cards, inputs and of owners' secret keys, and the versions that the run
            began with
``round``   who was asked, each message that counted by client, version, weight and digest, what was refused and why,
            who was missing, the digest of the server's state after it, and what each client contributed, where
            that was asked
``end``     the digest of every file of the finished run, the public key that signs, and how much a
            content filter found
``payout``  after the end: the budget, what it went by, each client's cents, the digest of ``payout.csv``
withdrawal  a client that was taken out of the run: its number and new name, the digest of its line in
            ``deletions.jsonl`` and of all lines above, some of them redacted; a beginning, rounds and an end follow
==========  ==================================================================================================
"""

from __future__ import annotations

import json
import math
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lichen.core.contracts.algorithm import Report
from lichen.core.files.manifest import sha256_of
from lichen.core.files.record import FORMAT, recorded_files

__all__ = ["beginning", "ending", "inputs_digests", "round_entry"]

_PACKAGES = ("lichen", "torch", "transformers", "peft", "numpy")
_INPUTS = "state/inputs.json"
_BEGINS = ("recipe.yaml", "roster.json", "cards.json", "fingerprints.json")


def beginning(run: Path, *, late: bool = False) -> dict[str, Any]:
    """The first line: what the run is made from.

    Args:
        run: Its folder.
        late: There were rounds before that no record holds.
    """
    digests = {name: sha256_of(run / name) for name in _BEGINS if (run / name).exists()}
    begun = {
        "kind": "begin",
        "format": FORMAT,
        "files": digests,
        "inputs": inputs_digests(run),
        "versions": _versions(),
    }
    return {**begun, "late": True} if late else begun


def inputs_digests(run: Path) -> dict[str, Any]:
    """Digests of rows, tokens and weights that a run was made from; none where it has noted none."""
    file = run / _INPUTS
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def round_entry(column: str, report: Report, state: str) -> dict[str, Any]:
    """A round's line.

    Args:
        column: Its folder within ``state/``.
        report: The round's.
        state: Digest of the server's state after it.
    """
    came = report.attendance
    valued = {} if report.value is None else {"value": report.value.dump()}
    return {
        "kind": "round",
        "column": column,
        "round": report.round,
        "asked": list(report.clients),
        "counted": [
            [one.client, one.version, one.weight if math.isfinite(one.weight) else None, one.sha256]
            for one in came.receipts
        ],
        "refused": dict(came.refused),
        "named": [[refusal.client, refusal.reason] for refusal in came.named],
        "missing": list(came.missing),
        "state": state,
        **valued,
    }


def ending(run: Path) -> dict[str, Any]:
    """The last line: the digest of every file."""
    return {"kind": "end", "files": {name: sha256_of(run / name) for name in recorded_files(run)}}
