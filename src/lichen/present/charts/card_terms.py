"""The part of a model card that says whose rows were learned from, under which terms, and what training took."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lichen.core.visible import visible
from lichen.data.cards.licences import is_spdx_id

__all__ = ["compute_text", "owners_text", "terms_matter", "terms_text", "whose_text"]

MOST_OWNERS = 50
"""Cards that a table shows; of more, the number."""

_HUB = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")


def terms_matter(base: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads of licences and data sets.

    One licence of base and rows is named as the hub calls it; of several, or of one that is on no public list, the hub
    is told ``other``, and all of them.

    Args:
        base: The base model's licence; empty where it is not known.
        summary: The run's.

    >>> terms_matter("Apache-2.0", {"licences": {"Apache-2.0": 3}})
    {'license': 'apache-2.0'}
    >>> terms_matter("Apache-2.0", {"licences": {"MIT": 3}})["license_details"]
    ['Apache-2.0', 'MIT']
    """
    names = sorted({*([base] if base else []), *summary.get("licences", {})})
    found: dict[str, Any] = {}
    if len(names) == 1 and (names[0] == base or is_spdx_id(names[0])):
        found["license"] = names[0].lower()
    elif names:
        found |= {"license": "other", "license_name": "several" if len(names) > 1 else names[0].lower()}
        found["license_details"] = names
    hubs = [at[1] for one in summary.get("cards", ()) if (at := _HUB.fullmatch(one["source"] or ""))]
    return found | ({"datasets": list(dict.fromkeys(hubs))} if hubs else {})


def owners_text(summary: Mapping[str, Any]) -> str:
    """Whose rows these are by their data cards, and who was left out; empty where no owner says anything."""
    cards, left = summary.get("cards") or (), summary.get("cards_left") or ()
    parts = []
    if cards:
        lines = ["| Owner | Clients | Source | Licence | Purposes | Until |", "|---|---|---|---|---|---|"]
        lines += [_row(one) for one in cards[:MOST_OWNERS]]
        more = len(cards) - MOST_OWNERS
        parts.append("\n".join(lines) + (f"\n\nand {more:,} more owners." if more > 0 else ""))
    parts += [_left(one) for one in left[:MOST_OWNERS]]
    if len(left) > MOST_OWNERS:
        parts.append(f"And {len(left) - MOST_OWNERS:,} more owners were left out.")
    return "## Whose rows they are\n\n" + "\n\n".join(parts) + "\n" if parts else ""


def whose_text(summary: Mapping[str, Any], values: Sequence[float], fingerprints: int) -> str:
    """What the owners have given and got, and how many can claim the model; no owner by name, as cards travel.

    Args:
        summary: The run's.
        values: What each client contributed; none where nobody asked.
        fingerprints: Owners whose secret pairs the model was trained on.
    """
    parts, gains = [], (summary.get("gains") or {}).get("federated", {})
    for other, gain in gains.items():
        many, harmed = gain["clients"], round(gain["harmed"] * gain["clients"])
        gaining = round(gain["gaining"] * many)
        parts.append(f"{gaining} of {many} clients score better with it than with `{other}`, {harmed} worse.")
    if (total := math.fsum(value for value in values if value > 0)) > 0:
        shares = sorted((100 * max(value, 0.0) / total for value in values), reverse=True)
        below = sum(value < 0 for value in values)
        parts.append(
            f"Of all that clients contributed, by the fall of the loss, the one that gave most has {shares[0]:.0f} %, "
            f"half of them at least {shares[(len(shares) - 1) // 2]:.1f} %, and {below} have made the model worse."
        )
    if fingerprints:
        parts.append(f"{fingerprints} owners can claim it by secret pairs that were registered before training.")
    return "## Whose it is\n\n" + "\n".join(parts) + "\n" if parts else ""


def _row(card: Mapping[str, Any]) -> str:
    words = (card["owner"], card["clients"], card["source"], card["licence"], ", ".join(card["purposes"]))
    return f"| {' | '.join(_cell(word) for word in words)} | {card['until'] or 'no end'} |"


def _left(left: Mapping[str, Any]) -> str:
    count = len(left["clients"])
    return f"Left out: {count} client{'' if count == 1 else 's'} of {_cell(left['owner'])}: {_cell(left['why'])}."


def terms_text(base: str, summary: Mapping[str, Any]) -> str:
    """Under which licences base and rows come; empty where none is known."""
    licences: Sequence[tuple[str, int]] = sorted(summary.get("licences", {}).items())
    parts = [f"The base model comes under {base}; what was learned from rows may be bound by theirs."] if base else []
    if licences:
        each = ", ".join(f"{_cell(name)} ({count:,} client{'' if count == 1 else 's'})" for name, count in licences)
        parts.append(f"The rows come under {each}, as their owners say.")
    return f"## Licence\n\n{' '.join(parts)}\n" if parts else ""


def compute_text(summary: Mapping[str, Any]) -> str:
    """Operations of training, beside a third of those of the base's own; empty where they were not counted.

    The third is the line of the European Commission's "Guidelines on the scope of the obligations for general-purpose
    AI models", 18 July 2025. It is told, and no conclusion is drawn.
    """
    compute = summary.get("compute")
    if compute is None or "federated" not in compute["training_flops"]:
        return ""
    own, base = compute["training_flops"]["federated"], compute["base_flops"]
    parts = [
        f"Training in the federation took about {own:.2g} floating-point operations, all learning rates that were tried"
        " included. This is an estimate: 4 for each token and frozen weight that it passes, 6 for each trained one, and"
        " those of attention; what was evaluated, labelled or written by a model is not in it."
    ]
    if base is None:
        parts.append("A third of the operations of the base's own training: not known.")
    else:
        share = f"this is {own / (base / 3):.1g} of it"
        parts.append(f"A third of those of the base's own training is {base / 3:.2g}; {share}.")
        parts.append(f"The base's: {_cell(compute['base_source'])}.")
    parts.append(
        "A third of the original model's training compute is the line at which the European Commission's guidelines of"
        " July 2025 on general-purpose AI models take whoever modifies such a model for its provider."
    )
    return f"## Training compute\n\n{' '.join(parts)}\n"


def _cell(word: object) -> str:
    text = "not stated" if word in (None, "") else str(word)
    return visible(text).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
