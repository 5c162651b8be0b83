"""Splits rows into training, validation and test: stratified, groups whole, no copies across.

Rows are dealt out by kind (their class, or an answer that others give too), the rarest kind first. What one kind
cannot give a part exactly, because rows are whole, is made up for by the next. For groups of several kinds this is
the iterative stratification of Sechidis et al. with the order of kinds fixed beforehand.

References:
    Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011,
    https://doi.org/10.1007/978-3-642-23808-6_10
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.sources.record import Record
from lichen.data.splits.fingerprint import Reads, fingerprint

__all__ = ["some_of_each", "split_records"]

TRAIN, VALID, TEST = range(3)

NEAR_ONE = 0.75
"""A part that is due so much of a row of a kind, or more, gets one."""


def split_records(
    records: Sequence[Record],
    *,
    valid: float,
    test: float,
    seed: int,
    by: Literal["group", "row"] = "group",
    reads: Reads = "pair",
    kinds: Sequence[str] | None = None,
) -> tuple[list[Record], list[Record], list[Record]]:
    """Part rows into ``(train, valid, test)``.

    Units are dealt whole: groups, or rows (all copies of one row are one unit). The largest unit trains, and
    so does at least one of every kind; valid and test get at least one unit each where there are enough,
    test first. Where groups hold copies of one another, the copy in valid or test is dropped, so that no row of
    a part stands in another.

    Args:
        records: The rows.
        valid: Share of rows for validation, in [0, 1).
        test: Share of rows for test, in [0, 1).
        seed: Seed of the draw; give each client its own.
        by: Keep groups together, or deal out single rows.
        reads: What a model reads of a row, and so what makes two rows copies.
        kinds: What each row is, such as its class; each part gets its share of every kind. An empty text is
            a row of no kind. None: all rows are alike.

    Raises:
        LichenError: if the shares do not leave anything to train on.
    """
    if not (0 <= valid < 1 and 0 <= test < 1 and valid + test < 1):
        raise LichenError(f"shares are {valid} and {test}", where="data.valid", fix="use shares that sum below 1")
    marks = [fingerprint(record, reads=reads) for record in records]
    units: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records):
        grouped = by == "group" and record.group
        units.setdefault(("group", record.group) if grouped else ("row", marks[i]), []).append(i)
    pool = list(units.values())
    pool = [pool[i] for i in numpy_generator(seed, "split").permutation(len(pool))]
    kind_of = _kinds(pool, kinds)
    part_of = _filled(_deal(pool, kind_of, (1 - valid - test, valid, test)), kind_of, (valid, test))
    parts: list[list[int]] = [[], [], []]
    for unit, part in zip(pool, part_of, strict=True):
        parts[part] += unit
    learned = {marks[i] for i in parts[TRAIN]}
    scored = {marks[i] for i in parts[TEST]} - learned

    def rows(part: int, without: set[str]) -> list[Record]:
        return [records[i] for i in sorted(parts[part]) if marks[i] not in without]

    return rows(TRAIN, set()), rows(VALID, learned | scored), rows(TEST, learned)


def some_of_each(kinds: Sequence[str], count: int, seed: int) -> list[int]:
    """``count`` places drawn by the seed, ascending: each kind has its share of them, and one where that is possible.

    >>> some_of_each(["a", "b", "a", "a", "a", "a"], 2, seed=0)[1:]
    [4]
    """
    if count >= len(kinds):
        return list(range(len(kinds)))
    often, seen = Counter(kinds), Counter[str]()
    place: list[tuple[float, int, str, int]] = []
    for i in numpy_generator(seed, "some of each").permutation(len(kinds)).tolist():
        kind = kinds[i]
        place.append((seen[kind] / often[kind], -often[kind], kind, i))
        seen[kind] += 1
    return sorted(i for *_, i in sorted(place)[:count])


def _kinds(pool: Sequence[Sequence[int]], kinds: Sequence[str] | None) -> list[str]:
    """Each unit's kind: of several in a group the rarest."""
    if kinds is None:
        return [""] * len(pool)
    often = Counter(kinds)
    return [min({kinds[i] for i in unit} - {""}, key=lambda kind: (often[kind], kind), default="") for unit in pool]


def _deal(pool: Sequence[Sequence[int]], kind_of: Sequence[str], shares: tuple[float, float, float]) -> list[int]:
    """The part of every unit."""
    of: dict[str, list[int]] = {}
    for unit, kind in enumerate(kind_of):
        of.setdefault(kind, []).append(unit)
    largest = max(range(len(pool)), key=lambda unit: len(pool[unit]), default=-1)
    part_of = [TRAIN] * len(pool)
    owed = [0.0, 0.0, 0.0]  # rows that a part is still due of the kinds before
    for kind in sorted(of, key=lambda kind: (kind == "", len(of[kind]), kind)):
        mine = sorted(of[kind], key=lambda unit: unit != largest)
        rows = sum(len(pool[unit]) for unit in mine)
        owed = [due + share * rows for due, share in zip(owed, shares, strict=True)]
        first = [part for part in (TRAIN, TEST, VALID) if part == TRAIN or shares[part] * len(mine) >= NEAR_ONE]
        most = [len(mine)] + [max(1, int(len(mine) * max(share, 0.5))) if share else 0 for share in shares[1:]]
        count = [0, 0, 0]
        for at, unit in enumerate(mine):
            free = [part for part in (TEST, VALID, TRAIN) if count[part] < most[part]]
            # Of equal dues that with fewest rows of this kind comes first.
            part = first[at] if at < len(first) else max(free, key=lambda part: (round(owed[part], 9), -count[part]))
            part_of[unit] = part
            owed[part] -= len(pool[unit])
            count[part] += 1
    return part_of


def _filled(part_of: Sequence[int], kind_of: Sequence[str], shares: tuple[float, float]) -> list[int]:
    """The same, with a unit for test and one for valid where they were left empty and another part can spare one."""
    out = list(part_of)
    for part, share in ((TEST, shares[1]), (VALID, shares[0])):
        if share and part not in out:
            count = Counter(out)
            giver = max(range(3), key=lambda other: (count[other], -other))
            mine = [unit for unit in range(len(out)) if out[unit] == giver]
            often = Counter(kind_of[unit] for unit in mine)
            if len(mine) > 1:
                out[max(mine, key=lambda unit: (often[kind_of[unit]], unit))] = part
    return out
