"""Pays the clients of a finished run: ``payout.csv``, and a line in the run's record, whose head is signed anew.

The line comes after the record's end and names the file's digest, the budget and every client's cents. A run may be
paid again: the newest line is the one that the file belongs to.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_all
from lichen.core.files.lock import one_process
from lichen.core.files.record import FORMAT, RECORD, SIGNED, Signer, canonical, chain, signed
from lichen.present.cells import text_cell
from lichen.present.clients import read_clients
from lichen.present.summary import read_summary
from lichen.present.trace import read_trace
from lichen.recipes.artifacts.contributions import read_contributions
from lichen.recipes.artifacts.record import seal_run
from lichen.recipes.artifacts.shares import Payment, amount, cents_of, floor_of, shared_out
from lichen.recipes.artifacts.verify import KEY, PAYOUT, verify
from lichen.recipes.artifacts.withdrawn.deletions import withdrawn_numbers
from lichen.recipes.assemble.experiment import lr_name
from lichen.recipes.assemble.run_folder import LOCK
from lichen.recipes.schema.read import recipe_of
from lichen.recipes.stages.folder import last_stage

__all__ = ["By", "pay"]

By = Literal["value", "rows", "bytes", "equal"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Paid:
    """What a client is paid, and why.

    Attributes:
        client: Its name.
        brought: Its value, rows or bytes; 1 where all are paid alike.
        cents: What it is paid.
        why: A sentence.
    """

    client: str
    brought: float
    cents: int
    why: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Payout:
    """A budget that is shared out.

    Attributes:
        by: What it goes by.
        budget: In cents.
        clients: In roster order.
    """

    by: By
    budget: int
    clients: tuple[Paid, ...]

    def csv(self) -> str:
        """A line a client, as cells that no spreadsheet runs."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["client", self.by, "paid", "why"])
        for one in self.clients:
            writer.writerow([text_cell(one.client), _number(one.brought), amount(one.cents), text_cell(one.why)])
        return out.getvalue()


def pay(
    folder: Path | str, budget: str, *, floor: str = "0.1", by: By = "value", signer: Signer | None = None
) -> Payout:
    """Share a budget out among the clients of a finished run, and put it on record.

    Args:
        folder: The run's.
        budget: An amount, such as ``1000.00``.
        floor: Share of it that is the same for all who are paid.
        by: What the rest goes by.
        signer: Whose key signs the record; None: the run's own.

    Raises:
        LichenError: if the budget is no amount, the run is not finished or not what was signed, or does not tell what
            clients brought. Nothing is written then.
    """
    folder = last_stage(folder)
    cents, equal = cents_of(budget), floor_of(floor)
    read_summary(folder)  # says so where the run is not finished
    with one_process(folder, LOCK, say=lambda _: None):
        names, brought = _brought(folder, by)
        signer = _signer(folder, signer)
        gone = withdrawn_numbers(folder)
        paid = shared_out(cents, [-1.0 if at in gone else x for at, x in enumerate(brought)], equal)
        say = _sentences(by, brought)
        clients = tuple(
            Paid(
                client=name, brought=x, cents=one.cents, why="nothing: it was withdrawn" if at in gone else say(x, one)
            )
            for at, (name, x, one) in enumerate(zip(names, brought, paid, strict=True))
        )
        found = Payout(by=by, budget=cents, clients=clients)
        _write(folder, found, floor, signer)
    return found


def _brought(folder: Path, by: By) -> tuple[tuple[str, ...], list[float]]:
    """``(names, what each has brought)``, in roster order."""
    if by == "value":
        contributions = read_contributions(folder)
        if contributions.private:
            what = "each client alone knows its value under masks, and keeps it at home"
            raise LichenError(what, where=str(folder), fix="use --by rows, bytes or equal")
        return contributions.clients, list(contributions.totals)
    rows = read_clients(folder)
    names = tuple(str(row["client"]) for row in rows)
    if by == "equal":
        return names, [1.0] * len(names)
    if by == "rows":
        counts = [row["train"] for row in rows]
        if any(count is None for count in counts):
            raise LichenError("does not tell how many rows its clients have", where=str(folder), fix="use --by equal")
        return names, [float(count) for count in counts]
    return names, _bytes(folder, len(names))


def _bytes(folder: Path, clients: int) -> list[float]:
    """Bytes that each client has sent to train the federated column: equal messages make a round's."""
    recipe, rate = recipe_of(folder), read_summary(folder)["extra"].get("lr.federated")
    if recipe.exchange is not None or recipe.federation.ranks or recipe.federation.memory or rate is None:
        what = "its clients' messages are of unequal size, and only their sum is known"
        raise LichenError(what, where=str(folder), fix="use --by rows, or value")
    sent: list[list[float]] = [[] for _ in range(clients)]
    for event in read_trace(folder):
        report = event.report
        if (event.column, event.grid) != ("federated", lr_name(float(rate))):
            continue
        attendance = report.attendance
        away = {*attendance.missing, *attendance.uncounted, *(refusal.client for refusal in attendance.named)}
        came = [client for client in report.clients if client not in away]
        for client in came:
            sent[client].append((report.bytes_up - report.valid_up) / len(came))
    return [math.fsum(mine) for mine in sent]


def _sentences(by: By, brought: Sequence[float]) -> Callable[[float, Payment], str]:
    """From what a client has brought and is paid to the sentence that says why."""
    total = math.fsum(x for x in brought if x > 0)
    unit = {"value": "of all value above zero", "rows": "of all training rows", "bytes": "of all bytes sent"}

    def why(x: float, paid: Payment) -> str:
        if by == "equal":
            return "an equal share"
        if x < 0:
            return f"nothing: its value is below zero ({x:.4g}), so its messages made the model worse"
        if x == 0:
            return f"{amount(paid.floor)}, the floor: it has brought nothing else"
        return f"{amount(paid.floor)}, the floor, and {amount(paid.cents - paid.floor)} for {x / total:.2%} {unit[by]}"

    return why


def _number(x: float) -> str:
    return str(int(x)) if x == int(x) else repr(x)


def _signer(folder: Path, signer: Signer | None) -> Signer:
    """Whose key signs the payout: it must be that of the record, which must hold."""
    found = verify(folder)
    if signer is None and found.federation:
        raise LichenError(
            f"the federation {found.federation} has signed this run, and its key is not here",
            where=str(folder),
            fix="name the federation's folder with --federation",
        )
    signer = signer or Signer(folder / KEY)
    if signer.named["public_key"] != found.key:
        raise LichenError("another key has signed this run", where=str(folder), fix="name the federation that ran it")
    return signer


def _write(folder: Path, payout: Payout, floor: str, signer: Signer) -> None:
    data = payout.csv().encode("utf-8", "backslashreplace")
    lines, head = chain(folder / RECORD)
    entry: dict[str, Any] = {
        "kind": "payout",
        "by": payout.by,
        "budget": amount(payout.budget),
        "floor": floor,
        "paid": [[client, one.cents] for client, one in enumerate(payout.clients) if one.cents],
        "files": {PAYOUT: hashlib.sha256(data).hexdigest()},
        "before": head,
    }
    line = canonical(entry)
    body = {"format": FORMAT, "head": hashlib.sha256(line).hexdigest(), "lines": len(lines) + 1}
    record = b"".join([*map(canonical, lines), line])
    files = {PAYOUT: data, RECORD: record, SIGNED: signed(body, signer)}
    write_all({f"{folder}/{name}": content for name, content in files.items()})
    seal_run(folder)
