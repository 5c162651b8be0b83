"""Makes tables of finished runs: the baselines side by side, several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lichen.core.errors import LichenError
from lichen.present.column_names import column_title
from lichen.present.gains import gains_text
from lichen.present.reading import copies_text, masks_rows, privacy_rows, reading_rows
from lichen.present.summary import COLUMNS
from lichen.present.table import new_table
from lichen.present.units import bytes_text, joules_text, score_text, seconds_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["attack_text", "compare_table", "summary_table", "training_text"]


MOST_NAMES = 8
"""Liars that are named one by one; the summary has them all."""

_ORDER = ("base", "alone", "alone_best", "federated", "personal", "chosen", "pooled", "big", "proxy")


def _metric(summary: Mapping[str, Any]) -> str:
    return f"{summary['metric']} ({'higher' if summary['higher_is_better'] else 'lower'} is better)"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _scores(summary: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    columns = {**summary["columns"], **summary["extra_columns"]}
    order = (*_ORDER, *(name for name in columns if name not in _ORDER))
    return {column_title(name): columns[name] for name in order if columns.get(name) is not None}


def _worst(score: Mapping[str, Any]) -> str:
    return "-" if score["worst_decile"] is None else score_text(score["worst_decile"])


def _no_worst(summary: Mapping[str, Any]) -> dict[str, str]:
    """Why the worst decile is left out where it is."""
    if all(score["worst_decile"] is not None for score in _scores(summary).values()):
        return {}
    if summary.get("masks") and not summary["masks"]["simulated"]:
        return {"worst decile": "left out (-): under masks scores of fewer than ten clients are only added up"}
    return {"worst decile": "left out (-) where all clients share one test set and one model: it would be the mean"}


def training_text(training: Mapping[str, Any]) -> str:
    """What a column was trained on, in a line.

    Args:
        training: As :class:`lichen.present.summary.Training` holds it, or a plan, which knows no rounds.
    """
    rows = (
        f"{training['rows']:,.0f} rows: {training['passes']:.2g} passes over {training['rows_there']:,}, "
        f"{_percent(training['share_seen'])} of them seen"
    )
    if "rounds" not in training:
        return rows
    round_text = "each client's best kept" if training["kept"] is None else f"round {training['kept']} kept"
    return f"{training['rounds']} of {training['of']} rounds, {round_text}; {rows}"


def attack_text(attack: Mapping[str, Any], clients: int) -> str:
    """Who lied on purpose, in a line.

    Args:
        attack: As :class:`lichen.present.summary.Attacked` holds it.
        clients: How many there were.

    >>> attack_text({"kind": "sign_flip", "liars": 2, "names": ["ada", "bo"]}, 10)
    'sign_flip by 2 of 10 clients: ada, bo'
    """
    names = attack["names"][:MOST_NAMES]
    more = f" and {attack['liars'] - len(names)} more" if attack["liars"] > len(names) else ""
    return f"{attack['kind']} by {attack['liars']} of {clients} clients: {', '.join(names)}{more}"


def _attacked(summary: Mapping[str, Any]) -> dict[str, str]:
    """That clients lied on purpose; their test rows are honest, and count in every score."""
    attack = summary.get("attack")
    return {} if attack is None else {"attacked on purpose": attack_text(attack, summary["clients"])}


def _sent(summary: Mapping[str, Any], way: str) -> str:
    """Bytes in all, and of validation among them where that is known."""
    valid = (summary["traffic"] or {}).get(f"valid_{way}")
    whole = bytes_text(summary[f"bytes_{way}"])
    return f"{whole}, {bytes_text(valid)} of it for validation" if valid else whole


def _validating(summary: Mapping[str, Any]) -> dict[str, str]:
    """How many clients validated, where it was not everybody."""
    validators = (summary["traffic"] or {}).get("validators")
    if validators is None or validators >= summary["clients"]:
        return {}
    return {"clients validating in a round": str(validators)}


def _gains(summary: Mapping[str, Any]) -> dict[str, str]:
    """Who gains and who is harmed, by what clients get and what they could have had without the others."""
    found = summary.get("gains") or {}
    return {f"{mine} beside {other}": gains_text(gain) for mine in found for other, gain in found[mine].items()}


def _copied(summary: Mapping[str, Any]) -> dict[str, str]:
    """Test rows that other clients train on, where they were counted."""
    copies = (summary.get("read") or {}).get("copies")
    return {} if copies is None else {"test rows that others train on": copies_text(copies)}


def _attended(summary: Mapping[str, Any]) -> dict[str, str]:
    """What was refused and who was missing, where anything was."""
    attended = summary.get("attendance")
    if attended is None:
        return {}
    parts = [f"{attended['arrived']} of {attended['invited']} count"]
    if attended.get("causes"):
        parts.append(", ".join(f"{cause} {count}" for cause, count in attended["causes"].items()))
    if attended["refused"]:
        parts.append("refused: " + ", ".join(f"{count} {reason}" for reason, count in attended["refused"].items()))
    parts += [f"missing: {attended['missing']}"] if attended["missing"] else []
    parts += [f"rounds skipped: {attended['skipped']}"] if attended["skipped"] else []
    return {"answers to the rounds": "; ".join(parts)}


def summary_table(summary: Mapping[str, Any]) -> Table:
    """One run: a row for each way of learning, then what it cost.

    Args:
        summary: As :func:`lichen.present.summary.check_summary` returns it.
    """
    from rich.text import Text

    heads = (summary["name"], "mean", "worst decile")
    table = new_table(None, *heads, numbers=heads[1:])
    for name, score in _scores(summary).items():
        style = "bold" if name == "federated" else ""
        table.add_row(Text(name), score_text(score["mean"]), _worst(score), style=style)
    table.add_section()
    failures = summary.get("failures", ())
    costs = {
        **({"NOTHING LEARNED": "; ".join(failures)} if failures else {}),
        **_attacked(summary),
        "metric": _metric(summary),
        **_no_worst(summary),
        **{f"{column_title(name)} trained": training_text(training) for name, training in summary["training"].items()},
        f"clients gaining over {summary.get('gaining_over') or 'alone'}": _percent(summary["share_gaining"]),
        **_gains(summary),
        **_copied(summary),
        "clients": str(summary["clients"]),
        "sent up": _sent(summary, "up"),
        "sent down": _sent(summary, "down"),
        **_validating(summary),
        **_attended(summary),
        "time": seconds_text(summary["seconds"]),
        "peak memory": bytes_text(summary["peak_memory_bytes"]),
        "energy": "not measured" if summary["energy_joules"] is None else joules_text(summary["energy_joules"]),
        "seed": str(summary["seed"]),
    }
    if summary.get("privacy"):
        for name, value in privacy_rows(summary["privacy"]):
            table.add_row(Text(name), Text(value), "")
    if summary.get("masks"):
        for name, value in masks_rows(summary["masks"]):
            table.add_row(Text(name), Text(value), "")
    for name, value in [*costs.items(), *summary["extra"].items()]:
        shown = value if isinstance(value, str) else score_text(value)
        table.add_row(Text(name), Text(shown), "")
    if summary.get("read"):
        table.add_section()
        for name, value in reading_rows(summary["read"]):
            table.add_row(Text(f"read: {name}"), Text(value), "")
    return table


def compare_table(summaries: Sequence[Mapping[str, Any]], *, folders: Sequence[str] = ()) -> Table:
    """Several runs: a row each, mean and worst decile (after the slash) of each way of learning.

    Args:
        summaries: As :func:`lichen.present.summary.check_summary` returns them.
        folders: Where each one lies, shown beside its name; none shows names only.

    Raises:
        LichenError: without runs.
    """
    from rich.text import Text

    if not summaries:
        raise LichenError("no runs to compare", where="report", fix="name the folders of finished runs")
    extra = sorted({column_title(name) for summary in summaries for name in summary["extra_columns"]})
    ways = [*COLUMNS, *extra]
    if "alone_best" in extra:
        ways = [way for way in _ORDER if way in ways] + [way for way in extra if way != "alone_best"]
    heads = ["run", *(["folder"] if folders else []), "metric", *ways, "gaining", "clients", "up", "down", "time"]
    table = new_table("mean / worst decile of the clients", *heads, numbers=heads[heads.index("metric") + 1 :])
    for position, summary in enumerate(summaries):
        scores = _scores(summary)
        cells = [f"{score_text(scores[way]['mean'])} / {_worst(scores[way])}" if way in scores else "-" for way in ways]
        table.add_row(
            Text(summary["name"] + (" (attacked on purpose)" if summary.get("attack") else "")),
            *([Text(folders[position])] if folders else []),
            Text(_metric(summary)),
            *cells,
            _percent(summary["share_gaining"]),
            str(summary["clients"]),
            bytes_text(summary["bytes_up"]),
            bytes_text(summary["bytes_down"]),
            seconds_text(summary["seconds"]),
        )
    return table
