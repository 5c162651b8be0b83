"""The roster: who takes part, by what every client declares of itself.

A server holds nobody's rows. What it must know of them is declared once, before the first round: how many there
are and, where that may be told, of which labels. Whom to invite, who validates, how messages are weighed and what each
client is sent are decided by the roster alone. A client's place in it is its number in jobs and messages.

A declaration comes from another machine, and may be damage or a lie. So nothing is taken as it comes: numbers are
counts, names are short, of one line and each there once.

Legend: N clients of the roster.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.visible import visible

__all__ = ["MOST_MEMBERS", "MOST_ROWS", "PARTS", "Member", "Roster", "declared_name"]

PARTS = ("train", "valid", "test")
"""What a client's rows are for."""

FORMAT = 1
"""Of a dumped roster."""

MOST_LETTERS = 200
"""Of a name, a label or a group."""

MOST_LABELS = 1 << 16
MOST_ROWS = 1 << 40
MOST_MEMBERS = 10_000_000
"""More of these is damage, not data."""

_FIELDS = ("name", "rows", "labels", "capacity", "group")
_FIX = "both ends must run the same version of lichen; else leave this client out"


def _wrong(what: str) -> LichenError:
    return LichenError(what, where="roster", fix=_FIX)


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def declared_name(name: str) -> str:
    """A client's own name as it may be declared: one of any length and letters becomes short, and stays its own.

    >>> declared_name("ward-3")
    'ward-3'
    >>> declared_name("a\\x1bb")
    'a\\\\x1bb #1b036bb7'
    """
    shown = _one_line(name)
    if shown == name and 0 < len(name) <= MOST_LETTERS:
        return name
    return f"{shown[: MOST_LETTERS // 2]} #{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _check_text(text: object, what: str) -> None:
    if not isinstance(text, str) or len(text) > MOST_LETTERS or _one_line(text) != text:
        raise _wrong(f"{what} {text!r} is no name: it has one line of at most {MOST_LETTERS} letters")


def _check_count(number: object, what: str, most: float, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(number, bool) or not isinstance(number, kinds) or not 0 <= number <= most:
        raise _wrong(f"{what} is {number!r}, and no {'whole ' if whole else ''}number from 0 to {most:,}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One client, as it declares itself.

    Attributes:
        name: Its own name.
        rows: How many rows it has for each of :data:`PARTS`; a part that is missing has none.
        labels: How many training rows it has of each label, where labels may be told; else empty.
        capacity: What it can train, such as a rank and a number of blocks; None: everything.
        group: What its rows are; those of one group can train one model.

    Raises:
        LichenError: if any of this is no such thing.

    >>> Member(name="ward-3", rows={"train": 40, "test": 10})
    Member(name='ward-3', rows={'train': 40, 'test': 10}, labels={}, capacity=None, group='')
    """

    name: str
    rows: Mapping[str, int]
    labels: Mapping[str, float] = field(default_factory=dict)
    capacity: Hashable = None
    group: str = ""

    def __post_init__(self) -> None:
        _check_text(self.name, "a client's name")
        if not self.name:
            raise _wrong("a client has no name")
        _check_text(self.group, f"the group of {self.name!r}")
        if not isinstance(self.rows, Mapping) or not isinstance(self.labels, Mapping):
            raise _wrong(f"rows or labels of {self.name!r} are not counts by name")
        for part, rows in self.rows.items():
            if part not in PARTS:
                raise _wrong(f"{self.name!r} has rows for {part!r}, which is none of {', '.join(PARTS)}")
            _check_count(rows, f"the number of {part} rows of {self.name!r}", MOST_ROWS, whole=True)
        if len(self.labels) > MOST_LABELS:
            raise _wrong(f"{self.name!r} has {len(self.labels):,} labels, more than {MOST_LABELS:,}")
        for label, count in self.labels.items():
            _check_text(label, f"a label of {self.name!r},")
            _check_count(count, f"the number of rows of {self.name!r} with label {label!r}", MOST_ROWS, whole=False)
        if not _is_capacity(self.capacity):
            raise _wrong(f"the capacity of {self.name!r} is {self.capacity!r}, and no number, word or tuple of them")

    def dump(self) -> dict[str, Any]:
        """What JSON can write of it; what is empty is left out."""
        every = {name: getattr(self, name) for name in _FIELDS}
        every |= {"rows": dict(self.rows), "labels": dict(self.labels)}
        if isinstance(self.capacity, tuple):
            every["capacity"] = list(self.capacity)
        return {name: x for name, x in every.items() if name in ("name", "rows") or x not in ("", None, {})}

    @classmethod
    def load(cls, plain: object) -> Member:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no member.
        """
        if not isinstance(plain, Mapping) or not {"name", "rows"} <= plain.keys() <= set(_FIELDS):
            raise _wrong(f"a client is declared by {', '.join(_FIELDS)}, not by {plain!r}")
        capacity = plain.get("capacity")
        return cls(**{**plain, "capacity": tuple(capacity) if isinstance(capacity, list) else capacity})


def _is_capacity(value: object) -> bool:
    if isinstance(value, tuple):
        return (
            len(value) <= len(_FIELDS)
            and not any(isinstance(one, tuple) for one in value)
            and all(map(_is_capacity, value))
        )
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int) or (isinstance(value, str) and len(value) <= MOST_LETTERS)


@final
@dataclass(frozen=True, slots=True)
class Roster:
    """All clients, each at its number.

    Args:
        members: In the order of their numbers.

    Raises:
        LichenError: if there are none, if too many, if two have one name, or if nobody has a row.

    >>> roster = Roster((Member(name="a", rows={"train": 3}), Member(name="b", rows={"train": 1, "test": 2})))
    >>> len(roster), roster.rows_N("train").tolist(), roster.names
    (2, [3.0, 1.0], ('a', 'b'))
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.members) <= MOST_MEMBERS:
            raise _wrong(f"{len(self.members):,} clients, and not 1 to {MOST_MEMBERS:,}")
        seen = set[str]()
        for member in self.members:
            if member.name in seen:
                raise _wrong(f"two clients have the name {member.name!r}")
            seen.add(member.name)
        if not any(any(member.rows.values()) for member in self.members):
            raise _wrong(f"none of {len(self.members):,} clients has a row")

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __getitem__(self, client: int) -> Member:
        return self.members[client]

    @property
    def names(self) -> tuple[str, ...]:
        """The clients' own names."""
        return tuple(member.name for member in self.members)

    def rows(self, part: str) -> tuple[int, ...]:
        """Everybody's rows of one of :data:`PARTS`."""
        if part not in PARTS:
            raise _wrong(f"{part!r} is none of {', '.join(PARTS)}")
        return tuple(member.rows.get(part, 0) for member in self.members)

    def rows_N(self, part: str) -> Tensor:
        """The same, float64 ``(N,)``."""
        return torch.tensor(self.rows(part), dtype=torch.float64)

    def labels(self) -> dict[str, float]:
        """Training rows of each declared label, over all clients."""
        out: dict[str, float] = {}
        for member in self.members:
            for label, count in member.labels.items():
                out[label] = out.get(label, 0) + count
        return out

    def digest(self) -> str:
        """SHA-256 (64 hex digits): equal for equal clients in equal order."""
        return hashlib.sha256(json.dumps(self.dump(), sort_keys=True).encode()).hexdigest()

    def dump(self) -> dict[str, Any]:
        """What JSON can write of it, for a message, a file or a checkpoint."""
        return {"format": FORMAT, "members": [member.dump() for member in self.members]}

    @classmethod
    def load(cls, plain: object) -> Roster:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if this is no roster.
        """
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            raise _wrong(f"is no roster of format {FORMAT}")
        members = plain.get("members")
        if not isinstance(members, list) or not 0 < len(members) <= MOST_MEMBERS:
            raise _wrong(f"a roster is a list of 1 to {MOST_MEMBERS:,} clients")
        return cls(tuple(Member.load(one) for one in members))
