"""Prints the table of a plan: cost by column, and what will not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lichen.present.column_names import column_title
from lichen.present.report import training_text
from lichen.present.table import new_table
from lichen.present.units import bytes_text, count_text, joules_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plan_table"]


def plan_table(plan: Mapping[str, Any]) -> Table:
    """A row for each column's time and work, then bytes, memory, disk, energy and what fits whom, problems and notes.

    Args:
        plan: As :meth:`lichen.recipes.plan.plan.Plan.as_dict` gives it.
    """
    from rich.text import Text

    heads = (plan["name"], "time", "trained on", "evaluated", "FLOPs")
    table = new_table(None, *heads, numbers=heads[1:])
    table.add_row("loading", seconds_text(plan["start"]), "-", "-", "-")
    for name, cost in plan["columns"].items():
        seen = [count_text(cost[key]) if cost[key] else "-" for key in ("train_tokens", "evaluate_tokens")]
        flops = f"{cost['train_flops'] + cost['evaluate_flops']:.2g}"
        table.add_row(Text(column_title(name)), seconds_text(cost["seconds"]), *seen, flops)
    table.add_row("all", seconds_text(plan["seconds"]), "", "", "", style="bold")
    table.add_section()
    for name, value in _facts(plan).items():
        table.add_row(Text(name), Text(value), "", "", "")
    if plan.get("privacy"):
        table.add_section()
        for name, value in _privacy(plan["privacy"]).items():
            table.add_row(Text(name), Text(value), "", "", "")
    if plan.get("masks"):
        table.add_section()
        for name, value in _masks(plan["masks"]).items():
            table.add_row(Text(name), Text(value), "", "", "")
    if plan["rooms"]:
        table.add_section()
    for tier in plan["rooms"]:
        who = f"{tier['clients']} client{'s' if tier['clients'] > 1 else ''} of {tier['memory']:g} GiB"
        what = f"rank {tier['rank']}, {tier['layers']} of {tier['of']} layers: {bytes_text(tier['needed'])} of tensors"
        table.add_row(Text(who), Text(what), "", "", "")
    problems = [(p["what"], p["change"]) for p in plan["problems"]]
    if problems or plan["notes"]:
        table.add_section()
    for what, change in problems:
        table.add_row(Text("will not fit"), Text(f"{what}; {change}"), "", "", "", style="bold red")
    for note in plan["notes"]:
        table.add_row("note", Text(note), "", "", "")
    return table


def _validation(plan: Mapping[str, Any]) -> dict[str, str]:
    sent = plan["bytes"]
    if not sent["validators"]:
        return {}
    who = f"{sent['validators']} of {plan['clients']} clients"
    bytes_ = f"{bytes_text(sent['valid_up'])} up, {bytes_text(sent['valid_down'])} down"
    return {"  of it validation": f"{bytes_}, by {who}"}


def _privacy(privacy: Mapping[str, Any]) -> dict[str, str]:
    """What noise will promise, and what of a round's change it leaves."""
    spent = ", ".join(f"{rounds}: {epsilon:.3f}" for rounds, epsilon in privacy["epsilon_by_round"])
    noise = f"norm {privacy['noise']:.3g} in a round's change of {count_text(privacy['numbers'])} numbers"
    return {
        "privacy": privacy["statement"],
        "  noise": f"{privacy['sigma']:.4g} times a clip of {privacy['clip']:g}, each client with chance "
        f"{privacy['rate']:.3g}",
        **({"  ε after rounds": spent} if spent else {}),
        **({"  against the server": privacy["server"]} if privacy.get("server") else {}),
        "  beside the signal": f"{noise}; the change itself has {privacy['clip']:g} at most",
        **{f"  note {place}": warning for place, warning in enumerate(privacy["warnings"], start=1)},
    }


def _masks(masks: Mapping[str, Any]) -> dict[str, str]:
    """What the server learns under masks, and what each stage costs."""
    numbers, holders = masks["numbers"], masks["neighbours"] + 1
    agreed = f"{masks['clients']}, each masks with {masks['neighbours']}; {masks['threshold']} of {holders} shares "
    return {
        "masks": masks["statement"],
        "  clients of a round": f"{agreed}open a secret",
        "  a message": f"{count_text(numbers)} numbers, {bytes_text(8 * numbers)}",
        **{
            f"  {place} {stage['name']}": f"{bytes_text(stage['up'])} up, {bytes_text(stage['down'])} down, "
            f"{_short(stage['seconds'])} of a client"
            for place, stage in enumerate(masks["stages"], start=1)
        },
        "  the server": f"{_short(masks['server_seconds'])} until the sum is open, {masks['gone']} of "
        f"{masks['clients']} clients being gone before the masked sum",
        "  bytes up of a round": f"{masks['factor']:.3g} times those without masks",
    }


def _short(seconds: float) -> str:
    return (
        f"{1000 * seconds:.2g} ms" if seconds < 0.0995 else f"{seconds:.2f}s" if seconds < 1 else seconds_text(seconds)
    )


def _facts(plan: Mapping[str, Any]) -> dict[str, str]:
    sent, memory, disk = plan["bytes"], plan["memory"], plan["disk"]
    most = "at most " if sent["bound"] else ""

    def both(up: str, down: str) -> str:
        return f"{bytes_text(sent[up])} up, {most}{bytes_text(sent[down])} down"

    seen = {f"{name} trains on": training_text(numbers) for name, numbers in plan["seen"].items()}
    return {
        **seen,
        "parameters": f"{count_text(plan['trained'])} trained, {count_text(plan['frozen'])} frozen",
        "clients": str(plan["clients"]),
        "sent by a client's training": f"{bytes_text(sent['client_up'])} up, {bytes_text(sent['client_down'])} down",
        "sent in a round": both("round_up", "round_down"),
        "sent in all": both("up", "down"),
        **_validation(plan),
        "memory": f"{bytes_text(memory['peak'])} at most, of {bytes_text(memory['available'])} there",
        "  the base": bytes_text(memory["base"]),
        "  once loaded": bytes_text(memory["loaded"]),
        "  a client": bytes_text(memory["client"]),
        f"  a block of {memory['clients']}": bytes_text(memory["block"]),
        "disk": f"{bytes_text(_disk(disk))}, of {bytes_text(disk['free'])} free",
        "  private state": bytes_text(disk["private"]),
        **({"  clients' messages": f"at most {bytes_text(disk['history'])}"} if disk["history"] else {}),
        **({"  states of earlier rounds": bytes_text(disk["checkpoints"])} if disk.get("checkpoints") else {}),
        "energy": "not measured" if plan["joules"] is None else joules_text(plan["joules"]),
        "runs on": f"{plan['engine']}, {plan['device']}",
    }


def _disk(disk: Mapping[str, int]) -> int:
    """Bytes of all that a run writes; plans of earlier versions know no states of earlier rounds."""
    return sum(disk.get(part, 0) for part in ("private", "shared", "history", "checkpoints"))
