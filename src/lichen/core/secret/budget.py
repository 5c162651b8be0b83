"""What has been spent of a privacy budget: a file of charges, each on the disk before anything can leave.

A round is charged before its jobs go out, and marked as closed before the noise of its sum is drawn. Each line carries
a digest of itself and of all before it, and is forced to the disk. So what the file says was spent is never less than
what has left, wherever a run is killed: a round that is done again after its sum was closed is charged again, with
another attempt's noise, and one whose sum was never closed goes on with the charge that it has.

==========  ===============================================================================
line        what it holds
==========  ===============================================================================
``begin``   format and terms: what every charge is a charge of
``charge``  round and attempt; its jobs may go out
``close``   round and attempt; its noise may be drawn
==========  ===============================================================================

References:
    Mathias Lécuyer, Riley Spahn, Kiran Vodrahalli, Roxana Geambasu and Daniel Hsu. "Privacy Accounting and Quality
    Control in the Sage Differentially Private ML Platform." SOSP 2019. https://arxiv.org/abs/1909.01502
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic

__all__ = ["Budget", "begun_with"]

FORMAT = 1
_SUM = 32
_FIX = "put the file back from a copy; without it nobody knows what was spent, and a new run begins a new budget"


@final
class Budget:
    """The charges of a run; one process writes them.

    Args:
        path: The file; begun when the first charge comes.
        terms: What a charge is a charge of, as JSON; the same in every session.
        limit: Charges that can be paid for; None: any number.
        gaps: Rounds may be missing, as those in which a client is not asked.

    Attributes:
        charges: Those so far.

    Raises:
        LichenError: if the file is damaged, or was begun with other terms.
    """

    def __init__(self, path: Path, *, terms: Mapping[str, Any], limit: int | None = None, gaps: bool = False) -> None:
        self.path, self.limit, self.gaps = path, limit, gaps
        self._terms: dict[str, Any] = json.loads(json.dumps(dict(terms)))
        self._sum = ""
        self._attempts: dict[int, int] = {}
        self._closed: set[tuple[int, int]] = set()
        self.charges = 0
        if path.exists():
            self._read()

    @property
    def exhausted(self) -> bool:
        """Whether no more charge can be paid for."""
        return self.limit is not None and self.charges >= self.limit

    def pays_for(self, round_: int) -> bool:
        """Whether a round can be begun: by a charge that is open still, or by a new one."""
        return self._open(round_) is not None or not self.exhausted

    def charge(self, round_: int) -> int:
        """Pay for a round before its jobs go out.

        Args:
            round_: From 0.

        Returns:
            The attempt at this round, from 0: the first one whose sum was never closed.

        Raises:
            LichenError: if the budget does not reach, or lacks a round before this one.
        """
        before = () if self.gaps else range(round_)
        if missing := [r for r in before if (r, self._attempts.get(r, -1)) not in self._closed]:
            what = f"round {missing[0] + 1} was done, and the budget does not say what it has cost"
            raise LichenError(what, where=str(self.path), fix=_FIX)
        if (attempt := self._open(round_)) is not None:
            return attempt
        if self.exhausted:
            raise LichenError(
                f"round {round_ + 1} would pass ε: {self.charges} charges are all that can be paid for",
                where="privacy.epsilon",
                fix="keep the model as it is",
            )
        attempt = self._attempts.get(round_, -1) + 1
        self._append({"kind": "charge", "round": round_, "attempt": attempt})
        return attempt

    def close(self, round_: int, attempt: int) -> None:
        """Say that a charge is used up, before the noise of its sum is drawn.

        Raises:
            LichenError: if it is not open.
        """
        if self._open(round_) != attempt:
            raise LichenError(
                f"attempt {attempt} at round {round_ + 1} is not open", where=str(self.path), fix="charge it first"
            )
        self._append({"kind": "close", "round": round_, "attempt": attempt})

    def _open(self, round_: int) -> int | None:
        """The attempt at a round that is charged and not closed."""
        attempt = self._attempts.get(round_)
        return None if attempt is None or (round_, attempt) in self._closed else attempt

    def _line(self, body: bytes) -> bytes:
        return hashlib.sha256(self._sum.encode() + body).hexdigest()[:_SUM].encode() + b" " + body + b"\n"

    def _append(self, entry: dict[str, Any]) -> None:
        if not self._sum:
            line = self._line(json.dumps({"kind": "begin", "format": FORMAT, "terms": self._terms}).encode())
            write_atomic(self.path, line)
            self._sum = line[:_SUM].decode()
        body = json.dumps(entry).encode()
        line = self._line(body)
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._sum = line[:_SUM].decode()
        self._apply(entry)

    def _apply(self, entry: Mapping[str, Any]) -> None:
        round_, attempt = int(entry["round"]), int(entry["attempt"])
        if entry["kind"] == "charge":
            self._attempts[round_] = attempt
            self.charges += 1
        else:
            self._closed.add((round_, attempt))

    def _read(self) -> None:
        data = self.path.read_bytes()
        lines, good = data.splitlines(keepends=True), 0
        for number, line in enumerate(lines, start=1):
            body = line[_SUM + 1 : -1]
            if line != self._line(body):
                # A line that a kill has cut short was not forced to the disk, and nothing has gone out for it.
                if number == len(lines) > 1 and not line.endswith(b"\n"):
                    break
                raise LichenError(f"line {number} is damaged", where=str(self.path), fix=_FIX)
            entry = json.loads(body)
            if number == 1:
                self._check(entry)
            else:
                self._apply(entry)
            self._sum = line[:_SUM].decode()
            good += len(line)
        if not lines:
            raise LichenError("is empty", where=str(self.path), fix=_FIX)
        if good < len(data):
            write_atomic(self.path, data[:good])

    def _check(self, entry: Mapping[str, Any]) -> None:
        if entry.get("format") != FORMAT:
            raise LichenError("is of another version", where=str(self.path), fix="go on with that version")
        other = [name for name, value in self._terms.items() if entry.get("terms", {}).get(name) != value]
        if other:
            what = f"was begun with another {other[0]}: {entry.get('terms', {}).get(other[0])}"
            raise LichenError(what, where=str(self.path), fix="go on as it was begun, or begin a new run")


def begun_with(path: Path) -> dict[str, Any] | None:
    """The terms that a budget was begun with; None where there is none.

    Raises:
        LichenError: if its first line is damaged.
    """
    if not path.exists():
        return None
    with open(path, "rb") as file:
        line = file.readline()
    body = line[_SUM + 1 : -1]
    if line[:_SUM].decode(errors="replace") != hashlib.sha256(body).hexdigest()[:_SUM]:
        raise LichenError("line 1 is damaged", where=str(path), fix=_FIX)
    terms: dict[str, Any] = json.loads(body)["terms"]
    return terms
