"""Prints an audit: tables, each with one plain sentence."""

from __future__ import annotations

from rich.table import Table

from lichen.present.table import new_table
from lichen.recipes.audit.audit import Audit
from lichen.recipes.audit.members import ATTACKS
from lichen.recipes.audit.messages import ReadMessage

__all__ = ["members_table", "members_words", "messages_table", "messages_words"]


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
    name, best = max(audit.membership.items(), key=lambda item: item[1].auc)
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
