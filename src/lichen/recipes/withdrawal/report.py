"""Measures what a way of forgetting has done, writes ``withdrawal.json`` into the new folder, and says it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.present.table import new_table
from lichen.present.units import score_text
from lichen.recipes.withdrawal.options import APPROXIMATE, NearOptions
from lichen.recipes.withdrawal.proof import prove
from lichen.recipes.withdrawal.request import Request

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["FORGOTTEN", "REPORT", "proof_table", "proof_words", "write_report"]

REPORT = "withdrawal.json"
"""In the new folder: how far its model has forgotten the client."""

FORGOTTEN = "forgotten.json"
"""In it once it is finished: what that cost, and how the others fare."""


def write_report(
    request: Request,
    *,
    options: NearOptions = NearOptions(),  # noqa: B008
    against: Path | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the new folder's model beside the old one's, and write what was found.

    Args:
        request: What was asked, and is done.
        options: How, where the way is an approximation.
        against: A run that was trained or replayed without the client.
        more: What else is to be written, such as the seconds that it took.

    Returns:
        What ``withdrawal.json`` holds. ``proof`` is null, and ``unproved`` says why, where nothing can be measured.

    Raises:
        LichenError: if ``against`` is no run of this recipe.
    """
    about: dict[str, Any] = {
        "client": request.client,
        "how": request.how,
        "approximate": request.how in APPROXIMATE,
        "options": options.of(request.how),
        "old": str(request.folder),
        "against": None if against is None else str(against),
        **(more or {}),
    }
    try:
        about["proof"] = prove(request.folder, request.out, request.number, against=against).as_dict()
    except LichenError as error:
        if against is not None:
            raise
        about |= {"proof": None, "unproved": str(error).partition("\n")[0]}
    write_atomic(request.out / REPORT, (json.dumps(about, indent=2, allow_nan=False) + "\n").encode())
    return about


def proof_table(report: Mapping[str, Any]) -> Table | None:
    """The models side by side; None where nothing was measured."""
    proof = report["proof"]
    if proof is None:
        return None
    heads = ("loss, trained on", "loss, held out", "gap", "membership AUC", "95 %", f"others, {proof['metric']}")
    table = new_table(None, "model", *heads, numbers=heads)
    for name, key in (("old", "old"), ("new", "new"), ("trained without", "replayed")):
        if (one := proof[key]) is not None:
            interval = "-" if one["auc"] is None else f"{one['auc_low']:.2f} to {one['auc_high']:.2f}"
            numbers = (score_text(one[part]) for part in ("train", "held_out", "gap", "auc"))
            table.add_row(name, *numbers, interval, score_text(one["others"]))
    return table


def proof_words(report: Mapping[str, Any]) -> list[str]:
    """What the numbers say, a sentence each."""
    out, proof, name = [], report["proof"], report["client"]
    if proof is None:
        return [f"not measured: {report['unproved']}"]
    out.append(f"{proof['rows']} rows of {name} were trained on, {proof['held_out_rows']} were not")
    if report["approximate"]:
        out.append(f"approximate: this is not the model of a run without {name}")
    if proof["replayed"] is None:
        if report["approximate"]:
            out.append("how far it is from that one: name its folder with --against")
        return out
    new, other = proof["new"], proof["replayed"]
    if new["train"] is not None and other["train"] is not None:
        apart = new["train"] - other["train"]
        side = "above" if apart > 0 else "below"
        out.append(f"its loss on them is {abs(apart):.4g} {side} that of the model trained without {name}")
    far = proof["distance"]
    if far is not None and math.isfinite(far):
        out.append(f"its tensors are {far:.3g} times as far from that model as the old one's")
    return out
