"""Prints an audit: tables, each with one plain sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lichen.audit.separation import Separation
from lichen.present.table import new_table
from lichen.recipes.audit.audit import Audit
from lichen.recipes.audit.canaries import FoundCanaries
from lichen.recipes.audit.members import ATTACKS
from lichen.recipes.audit.messages import ReadMessage
from lichen.recipes.audit.several import AuditedRun

__all__ = [
    "canaries_table",
    "canaries_words",
    "members_table",
    "members_words",
    "messages_table",
    "messages_words",
    "runs_table",
    "runs_words",
]


def members_table(audit: Audit) -> Table:
    """A line for each score."""
    rate = next(iter(audit.membership.values())).false_rate
    found = f"found at {rate:.0%} false"
    table = new_table(
        "Who was trained on, by the model's losses",
        *("score", "AUC", "95 %", found, "95 % "),
        numbers=("AUC", "95 %", found, "95 % "),
    )
    for name, x in audit.membership.items():
        table.add_row(
            ATTACKS[name],
            f"{x.auc:.3f}",
            f"{x.auc_low:.3f} to {x.auc_high:.3f}",
            f"{x.tpr:.1%}",
            f"{x.tpr_low:.1%} to {x.tpr_high:.1%}",
        )
    return table


def members_words(audit: Audit) -> str:
    """One sentence on the strongest score."""
    name, best = _strongest(audit)
    rows = f"{best.members} training and {best.others} test rows"
    if best.auc_low <= 0.5:
        return f"No score tells {rows} apart: the interval of the strongest ({ATTACKS[name]}) holds a coin's 0.5."
    return (
        f"The strongest score ({ATTACKS[name]}) puts a training row above a test row {best.auc:.1%} of the time, "
        f"on {rows}; a coin would 50 %."
    )


def messages_table(audit: Audit) -> Table:
    """A line for each message."""
    table = new_table(
        "What was read off single messages",
        *("client", "round", "tensor", "inputs", "bound", "span", "found", "right"),
        numbers=("round", "inputs", "bound", "span", "found", "right"),
    )
    for x in audit.messages:
        table.add_row(
            x.client, str(x.round), x.tensor, str(x.inputs), str(x.bound), str(x.span), str(x.found), str(x.right)
        )
    return table


def messages_words(audit: Audit) -> list[str]:
    """What that means, with an example where there is one."""
    if not audit.retained:
        return ["The run retained no messages to read: set federation.history: true to have them audited."]
    if not audit.messages:
        return ["No message has the change of a layer whose inputs are single tokens: no text is read by this attack."]
    best = max(audit.messages, key=lambda x: (x.right, -x.round))
    over = [x for x in audit.messages if x.inputs >= x.bound]
    lines = [_read(best)] if best.right else ["No token of any client was read off its message."]
    if over:
        lines.append(
            f"In {len(over)} of {len(audit.messages)} messages the rows have as many inputs as the tensor's bound or "
            "more, where this attack must fail; steps of Adam and noise end it earlier."
        )
    return lines


def _read(best: ReadMessage) -> str:
    unit = "tokens at their places" if best.placed else "tokens"
    order = "" if best.placed else ", its order not known"
    return (
        f"Off the message of {best.client} in round {best.round}, {best.right} of {best.inputs} {unit} are read, "
        f"{best.found - best.right} others with them; of one row{order}: {best.example!r}"
    )


def canaries_table(found: FoundCanaries) -> Table:
    """One line: how far those that were trained on stand out, and the least ε that fits the guesses."""
    heads = ("canaries", "in", "exposure, bits", "most", "right", "ε at least", "ε promised")
    table = new_table("What canaries show", *heads, numbers=heads)
    table.add_row(
        str(found.canaries),
        str(found.included),
        f"{found.exposure:.2f}",
        f"{found.exposure_most:.2f} of {found.exposure_full:.2f}",
        f"{found.bound.right} of {found.bound.guesses}",
        f"{found.bound.epsilon:.3f}",
        _epsilon(found.promised),
    )
    return table


def canaries_words(found: FoundCanaries) -> list[str]:
    """What that means, and what it cannot be held against."""
    bound = found.bound
    guesses = f"{bound.right} of {bound.guesses} guesses which canaries were trained on are right"
    at = f", δ = {found.delta:.2g}" if found.delta else ""
    if not bound.epsilon:
        lines = [f"{guesses}, as a coin's would be: no ε is ruled out."]
    else:
        lines = [f"{guesses}: training has an ε of {bound.epsilon:.3f} at least for one row (95 % confidence{at})."]
    if found.unit == "client":
        lines.append(
            "What was promised hides a client, and canaries are rows: one that changes changes its client for another, "
            "at up to twice that ε, so that the bound is not to be held against the promise."
        )
    elif found.promised is not None and bound.epsilon > found.promised:
        lines.append(
            "That is more than was promised: noise or accounting are at fault, or this is the one run in twenty in "
            "which chance does it; make another run."
        )
    return lines


def _epsilon(value: float | None) -> str:
    return "-" if value is None else f"{math.ceil(value * 1000) / 1000:.3f}"  # up, so that it holds


def runs_table(runs: Sequence[AuditedRun]) -> Table:
    """A line for each run: the score with the largest AUC, and what was read off all its messages."""
    _, best = _strongest(runs[0].found)
    found = f"found at {best.false_rate:.0%} false"
    planted = any(run.found.canaries is not None for run in runs)
    least = ("ε at least",) if planted else ()
    heads = ("run", "protected by", "ε", *least, "AUC", "95 %", found, "95 % ", "read of messages", "false")
    table = new_table("What each run gave away, by the strongest score", *heads, numbers=heads[2:])
    for run in runs:
        _, x = _strongest(run.found)
        read = [sum(values) for values in zip(*((m.right, m.inputs, m.found) for m in run.found.messages), strict=True)]
        table.add_row(
            Text(run.folder),
            run.protected_by,
            _epsilon(run.epsilon),
            *(() if not planted else ("-",) if run.found.canaries is None else (_least(run.found.canaries),)),
            f"{x.auc:.3f}",
            f"{x.auc_low:.3f} to {x.auc_high:.3f}",
            f"{x.tpr:.1%}",
            f"{x.tpr_low:.1%} to {x.tpr_high:.1%}",
            f"{read[0]} of {read[1]}" if read else "-",
            str(read[2] - read[0]) if read else "-",
        )
    return table


def runs_words(runs: Sequence[AuditedRun]) -> list[str]:
    """One sentence for each run."""
    lines = []
    for run in runs:
        _, best = _strongest(run.found)
        who = f"its strongest score puts a training row above a test row {best.auc:.1%} of the time"
        if best.auc_low <= 0.5:
            who = "no score tells training rows from test rows"
        lines.append(f"{run.folder}: {_text_read(run.found)}, and {who}.")
        if run.found.canaries is not None:
            lines += [f"{run.folder}: {line}" for line in canaries_words(run.found.canaries)]
    return lines


def _least(found: FoundCanaries) -> str:
    return f"{found.bound.epsilon:.3f}"


def _strongest(audit: Audit) -> tuple[str, Separation]:
    return max(audit.membership.items(), key=lambda item: item[1].auc)


def _text_read(audit: Audit) -> str:
    """What was read off all messages, as half a sentence."""
    if not audit.retained:
        return "it retained no message to read"
    if not audit.messages:
        return "no message has a layer whose inputs are single tokens"
    right, inputs, found = (sum(getattr(x, name) for x in audit.messages) for name in ("right", "inputs", "found"))
    over = sum(x.inputs >= x.bound for x in audit.messages)
    ends = f", {over} of which are at the bound or above" if over else ""
    if not right:
        return f"no token is read off {len(audit.messages)} messages{ends}"
    unit = "tokens at their places" if audit.messages[0].placed else "tokens"
    wrong = f"{found - right} others with them" if found > right else "no other with them"
    return f"{right} of {inputs} {unit} are read off {len(audit.messages)} messages{ends}, {wrong}"
