"""Prints what was read, for the screen and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lichen.present.column_names import column_title
from lichen.present.units import score_text

__all__ = [
    "CardLeft",
    "CardShown",
    "Masks",
    "Privacy",
    "Read",
    "copies_text",
    "masks_rows",
    "privacy_rows",
    "reading_lines",
    "reading_rows",
]

MOST_CLASSES = 12
"""Of more classes only the number and the sizes are told."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Left(_Part):
    why: str
    rows: _Count
    clients: _Count


class _Lengths(_Part):
    rows: _Count
    median: _Count
    longest: _Count
    most: _Count
    cut: _Count
    cut_prompt: _Count
    cut_answer: _Count
    prompts: _Count
    notes: list[str]


class _Used(_Part):
    clients: _Count
    train: _Count
    valid: _Count
    test: _Count
    unlabelled: _Count
    public: _Count


class _Copies(_Part):
    rows: _Count
    test_rows: _Count
    clients: _Count


class CardShown(_Part):
    """What the owner of some rows says of them, in its data card."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the card's file."""
    clients: _Count
    """Clients that take part with rows of this card."""
    owner: str | None
    source: str | None
    licence: str | None
    consent: str | None
    purposes: list[str]
    until: str | None


class CardLeft(_Part):
    """Whose rows were left out for their data card."""

    clients: list[str]
    owner: str | None
    why: str


class Masks(_Part):
    """What masks over the clients' messages promise."""

    statement: str
    clients: _Count
    """Expected in a round."""
    neighbours: _Count
    """Of each client, with whom it shares masks and secrets."""
    threshold: _Count
    """Shares that open a secret."""
    least: _Count
    """Clients whose sum may be opened."""
    stopped: list[str]
    """What could be tried against it, and what stops that."""
    not_promised: list[str]
    simulated: list[str]
    """What holds of a simulation alone."""
    deciles: dict[str, list[float]] = {}
    """By column: the nine scores that part the clients into tenths, of which nobody told its own; each is right to half
    a bin of the metric's histogram."""


class Privacy(_Part):
    """What noise promises, and what the promise does not speak of."""

    statement: str
    epsilon: Annotated[float, Field(ge=0)] | None
    """Null where it is infinite, or where noise followed from a seed."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: str
    """What is hidden: a client or a row."""
    clip: Annotated[float, Field(gt=0)]
    sigma: Annotated[float, Field(ge=0)]
    """Noise in a round's sum, in units of the clip."""
    rate: Annotated[float, Field(gt=0, le=1)]
    """Chance of each client in a round."""
    charges: _Count
    """Rounds that were paid for; more than were finished where some were done again."""
    left_out: list[str]
    """What the run does not tell, as it would be a release."""
    known: list[str]
    """What is taken as known to everybody."""
    simulated: list[str]
    """What is told beside the promise, because one process has everybody's rows anyway."""
    server: str | None = None
    """What is promised against the server where masks leave it sums alone; null where it sees each change."""
    warnings: list[str]


class Read(_Part):
    """What a summary holds of a :class:`lichen.data.reading.Reading`, which says what each number is."""

    rows: _Count
    clients: _Count
    least: _Count
    middle: _Count
    largest: _Count
    labels: dict[str, _Count]
    lengths: _Lengths | None
    used: _Used | None
    left: list[_Left]
    copies: _Copies | None
    alike: list[str]


def reading_rows(read: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a name and what there is to tell.

    Args:
        read: As :meth:`lichen.data.reading.Reading.as_dict` gives it.
    """
    rows = [("rows", _rows(read))]
    if read["used"]:
        rows.append(("used", _used(read["used"])))
    if read["labels"]:
        rows.append(("labels", _labels(read["labels"])))
    if read["lengths"] is not None:
        rows.append(("tokens", _tokens(read["lengths"])))
        rows.append(("cut", _cut(read["lengths"])))
        rows += [("note", note) for note in read["lengths"]["notes"]]
    rows += [("left out", _left(one)) for one in read["left"]]
    rows += [("note", note) for note in read["alike"]]
    return rows


def reading_lines(read: Mapping[str, Any]) -> list[str]:
    """The same as lines of one table."""
    rows = reading_rows(read)
    if read["copies"] is not None:
        rows.append(("copies", f"test rows that others train on: {copies_text(read['copies'])}"))
    width = max(len(name) for name, _ in rows)
    return ["what was read", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def copies_text(copies: Mapping[str, int]) -> str:
    """How many test rows stand in other clients' training rows.

    >>> copies_text({"rows": 3, "test_rows": 40, "clients": 2})
    '3 of 40 (8 %), of 2 clients'
    """
    rows, of = copies["rows"], copies["test_rows"]
    return f"{rows:,} of {of:,} ({_share(rows, of)}), of {_many(copies['clients'], 'client')}" if rows else "none"


def _rows(read: Mapping[str, Any]) -> str:
    if not read["clients"]:
        return f"{read['rows']:,}"
    least, middle, largest = (f"{read[key]:,}" for key in ("least", "middle", "largest"))
    span = f"{least} to {largest} each, {middle} in the middle" if least != largest else f"{least} each"
    return f"{read['rows']:,} of {_many(read['clients'], 'client')} ({span})"


def _used(used: Mapping[str, int]) -> str:
    parts = [("train", "to train on"), ("valid", "to choose by"), ("test", "to test"), ("unlabelled", "unlabelled")]
    counts = [f"{used[key]:,} {what}" for key, what in parts if used[key] or key == "train"]
    public = f"; {used['public']:,} public" if used["public"] else ""
    return f"{', '.join(counts)}, {_many(used['clients'], 'client')}{public}"


def _labels(labels: Mapping[str, int]) -> str:
    if len(labels) > MOST_CLASSES:
        return f"{len(labels)} classes with {min(labels.values()):,} to {max(labels.values()):,} rows"
    return ", ".join(f"{name} {count:,}" for name, count in labels.items())


def _tokens(lengths: Mapping[str, int]) -> str:
    return (
        f"{lengths['median']:,} a row in the middle, {lengths['longest']:,} at most ({lengths['rows']:,} rows counted)"
    )


def _cut(lengths: Mapping[str, int]) -> str:
    if not lengths["cut"]:
        return f"none is longer than {lengths['most']} (data.max_length)"
    whole = f"{lengths['cut']:,} of {lengths['rows']:,} rows ({_share(lengths['cut'], lengths['rows'])})"
    lost = [
        f"{lengths[key]:,} lose part of the {what}"
        for key, what in (("cut_prompt", "prompt"), ("cut_answer", "answer" if lengths["prompts"] else "text"))
        if lengths[key]
    ]
    return f"{whole} to {lengths['most']} tokens (data.max_length){': ' if lost else ''}{', '.join(lost)}"


def _left(left: Mapping[str, Any]) -> str:
    if not left["rows"]:
        return f"{_many(left['clients'], 'client')}, whose rows were not read: {left['why']}"
    clients = f" of {_many(left['clients'], 'client')}" if left["clients"] else ""
    return f"{_many(left['rows'], 'row')}{clients}: {left['why']}"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return f"{share:.0f} %" if share >= 1 or not part else "less than 1 %"


def privacy_rows(privacy: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(name, value)`` of what noise promises.

    Args:
        privacy: As :class:`Privacy` holds it.
    """
    noise = f"{privacy['sigma']:.4g} times a clip of {privacy['clip']:g}, in {privacy['charges']} sums"
    rows = [("privacy", privacy["statement"]), ("  noise", noise), ("  chance of a client", f"{privacy['rate']:.3g}")]
    words = {"left_out": "left out", "known": "taken as known", "simulated": "of the simulation", "warnings": "note"}
    if privacy.get("server"):
        rows.append(("  against the server", privacy["server"]))
    return [*rows, *((f"  {words[key]}", what) for key in words for what in privacy[key])]


def masks_rows(masks: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``(name, value)`` of what masks promise.

    Args:
        masks: As :class:`Masks` holds it.
    """
    shares = f"{masks['neighbours']} neighbours each; {masks['threshold']} shares open a secret"
    rows = [("masks", masks["statement"]), ("  each client", shares)]
    words = {"stopped": "stopped", "not_promised": "not promised", "simulated": "of the simulation"}
    deciles = {name: ", ".join(map(score_text, scores)) for name, scores in masks["deciles"].items()}
    rows += [(f"  deciles of the clients, {column_title(name)}", text) for name, text in deciles.items()]
    return [*rows, *((f"  {words[key]}", what) for key in words for what in masks[key])]
