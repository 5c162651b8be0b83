"""The pool of synthetic rows, each with its provenance; it only grows.

Models that learn from models forget the rare and end in the mean: each generation that *replaces* its
data by the last one's output is further off. Where synthetic rows *accumulate* beside the real ones the
error stays bounded. So a pool only grows, there is no way to replace a row, and :func:`mix` keeps every
real row and bounds the share of synthetic ones.

On disk a pool is one JSON object a line, written whole or not at all; a file is only ever extended.

References:
    Ilia Shumailov, Zakhar Shumaylov, Yiren Zhao, Nicolas Papernot, Ross Anderson and Yarin Gal. "AI models
    collapse when trained on recursively generated data." Nature 631, 2024.
    https://doi.org/10.1038/s41586-024-07566-y
    Matthias Gerstgrasser et al. "Is Model Collapse Inevitable? Breaking the Curse of Recursion by
    Accumulating Real and Synthetic Data." COLM 2024. https://arxiv.org/abs/2404.01413
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import final

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.core.seeds import numpy_generator
from lichen.data.sources.record import Record

__all__ = ["Pool", "SyntheticRow", "load_pool", "mix", "sampled_rows", "save_pool"]


@final
@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """One synthetic text and where it came from.

    Attributes:
        text: What was written; never empty.
        label: The class it was asked for; None where there are none.
        model: Name of the foundation model.
        prompt: Digest of the prompt; empty where there was none.
        seed: Of this row's generation.
        generation: When it joined the pool, from 0; :meth:`Pool.grow` sets it.
        privacy: What is promised about private rows that had a say in it, as one sentence; empty: nothing is.
        client: Whom it was written for; empty: for everyone.
        tokens: What it cost to write, 0 where that was not counted.
    """

    text: str
    _: KW_ONLY
    label: str | int | None = None
    model: str = ""
    prompt: str = ""
    seed: int = 0
    generation: int = 0
    privacy: str = ""
    client: str = ""
    tokens: int = 0

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise LichenError(f"{name} is {value!r}", where="pool", fix="write " + _WORDS[kinds])
        if not self.text.strip() or self.tokens < 0 or self.generation < 0:
            raise LichenError(
                "a row is empty, or counts below 0", where="pool", fix="drop texts without words before they are added"
            )

    def record(self, *, client: str = "") -> Record:
        """The row as the rest of the house takes it; ``client`` stands where it was written for everyone."""
        return Record(client=self.client or client, text=self.text, label=self.label)


_TEXT, _NUMBER, _LABEL = (str,), (int,), (str, int, type(None))
_WORDS: dict[tuple[type, ...], str] = {
    _TEXT: "a text",
    _NUMBER: "a whole number",
    _LABEL: "a text, a whole number or null",
}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("text", "model", "prompt", "privacy", "client"), _TEXT),
    **dict.fromkeys(("seed", "generation", "tokens"), _NUMBER),
    "label": _LABEL,
}


@final
@dataclass(frozen=True, slots=True)
class Pool:
    """Rows in the order they joined; a larger pool begins with the smaller.

    Raises:
        LichenError: if a generation comes before an earlier one.

    >>> pool = Pool().grow([SyntheticRow("Fits well.", label="5", tokens=4)], generation=0)
    >>> pool = pool.grow([SyntheticRow("Too small.", label="1", tokens=3)], generation=1)
    >>> len(pool.rows), pool.tokens, pool.labels, pool.generation
    (2, 7, {'5': 1, '1': 1}, 1)
    """

    rows: tuple[SyntheticRow, ...] = ()

    def __post_init__(self) -> None:
        steps = [row.generation for row in self.rows]
        if steps != sorted(steps):
            raise LichenError("generations are out of order", where="pool", fix="add rows by growing the pool")

    @property
    def generation(self) -> int:
        """Of the newest rows; -1 where there is none."""
        return self.rows[-1].generation if self.rows else -1

    @property
    def tokens(self) -> int:
        """What all rows cost to write."""
        return sum(row.tokens for row in self.rows)

    @property
    def labels(self) -> dict[str | int | None, int]:
        """Rows of every label, in order of appearance."""
        return dict(Counter(row.label for row in self.rows))

    def grow(self, rows: Sequence[SyntheticRow], *, generation: int) -> Pool:
        """The pool with these rows behind its own; a row that this generation already holds is not added twice.

        So a run that was cut off and repeats its generation ends with the same pool.

        Args:
            rows: Written in this generation; their own number is overwritten.
            generation: The newest one's number, or a later one.

        Raises:
            LichenError: if the generation lies before the newest.
        """
        if generation < self.generation:
            raise LichenError(
                f"generation {generation} comes after generation {self.generation}",
                where="pool",
                fix="a pool only grows: count generations up",
            )
        # What a row cost is not what it is: an answer found on disk the second time costs nothing.
        existing = {replace(row, tokens=0) for row in self.rows if row.generation == generation}
        added = []
        for row in rows:
            free = replace(row, generation=generation, tokens=0)
            if free not in existing:
                existing.add(free)
                added.append(replace(free, tokens=row.tokens))
        return Pool((*self.rows, *added))

    def meant_for(self, client: str) -> Pool:
        """What was written for this client or for everyone."""
        return Pool(tuple(row for row in self.rows if row.client in ("", client)))

    def records(self, *, client: str = "") -> list[Record]:
        """All rows as records; ``client`` stands where a row was written for everyone."""
        return [row.record(client=client) for row in self.rows]


def mix(real: Sequence[Record], pool: Pool, *, share: float, seed: int, client: str = "") -> list[Record]:
    """Every real row, then synthetic ones up to a share of the whole: the guard against collapse.

    Which synthetic rows come, where not all do, follows from the seed; a smaller share takes a part of a
    larger one's rows. With no real row there is no synthetic one either.

    Args:
        real: Rows of a client; all are kept, in their order.
        pool: What may be added.
        share: Synthetic rows of all rows, from 0 to below 1.
        seed: Of the draw.
        client: Whose the synthetic rows become where they were written for everyone.

    Raises:
        LichenError: if the share is out of range: all but replacing the real rows is not offered.
    """
    return [*real, *(pool.rows[i].record(client=client) for i in sampled_rows(len(real), len(pool.rows), share, seed))]


def sampled_rows(real: int, written: int, share: float, seed: int) -> list[int]:
    """Which of so many written rows come beside so many real ones, rising; arguments and errors of :func:`mix`."""
    if not 0 <= share < 1:
        raise LichenError(
            f"a synthetic share of {share} leaves no room for real rows", where="pool.share", fix="use 0 to below 1"
        )
    # A hair more than the quotient, which may lie a hair under a whole number.
    most = math.floor(share / (1 - share) * real + 1e-9)
    found: list[int] = numpy_generator(seed, "pool").permutation(written)[:most].tolist()
    return sorted(found)


def save_pool(path: Path, pool: Pool) -> None:
    """Write a pool; a kill at any moment leaves the old file or the new one.

    Raises:
        LichenError: if there is a file already that is no beginning of this pool.
    """
    # What UTF-8 cannot hold (half a surrogate pair) is written as JSON's own escape, which reads back as it was.
    lines = [json.dumps(asdict(row), ensure_ascii=False).encode(errors="backslashreplace") for row in pool.rows]
    data = b"".join(line + b"\n" for line in lines)
    if path.exists() and not data.startswith(path.read_bytes()):
        raise LichenError(
            "holds rows that this pool lacks", where=str(path), fix="load it and grow it, or choose another file"
        )
    write_atomic(path, data)


def load_pool(path: Path) -> Pool:
    """Undo :func:`save_pool`.

    Raises:
        LichenError: if there is no such file, or a line is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        raise LichenError("no such pool", where=str(path), fix="check the path") from None
    if lines.pop() != b"":
        raise LichenError("its last line has no end", where=f"{path}, line {len(lines) + 1}", fix=_MEND)
    rows: list[SyntheticRow] = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line.decode())
            if not isinstance(fields, dict) or fields.keys() != set(_KINDS):
                raise ValueError("its fields are not those of a row")
            rows.append(SyntheticRow(fields.pop("text"), **fields))
            if len(rows) > 1 and rows[-2].generation > rows[-1].generation:
                raise ValueError("its generation comes before the line's above")
        except (LichenError, ValueError) as error:
            reason = error.what if isinstance(error, LichenError) else str(error)
            raise LichenError(f"damaged: {reason}", where=f"{path}, line {number}", fix=_MEND) from None
    return Pool(tuple(rows))


_MEND = "restore the file, or delete this line if its row may be lost"
