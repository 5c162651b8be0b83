"""Counts what was read: rows, clients, labels, tokens, and what was cut or dropped and why.

>>> rows = [Record(client="Ward A", text="one", label="ok"), Record(client="ward  a", text="two", label="late")]
>>> reading_of(rows).alike
("clients 'Ward A' and 'ward  a' differ only in case or blanks",)
"""

from __future__ import annotations

import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

import numpy as np

from lichen.data.batches.text import LmForm, encode_classify, encode_lm, label_set
from lichen.data.encode_notes import sentences
from lichen.data.sources.record import Record
from lichen.data.sources.table import column_of

__all__ = ["MOST_ENCODED", "Copies", "Left", "Reading", "alike", "lengths_of", "merged", "reading_of"]

MOST_ENCODED = 5000
"""Rows whose tokens are counted; of more, so many are taken at even distances."""

MOST_NAMED = 5
"""Pairs of names that are told; of more, the number."""

_ENDLESS = 1 << 30


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """What was left out, and why.

    Attributes:
        why: The reason, with the key that decides where there is one.
        rows: How many rows; 0 where they were not even read.
        clients: How many whole clients they make; 0 where the clients stay.
    """

    why: str
    rows: int
    clients: int = 0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of the rows, before anything is cut.

    Attributes:
        rows: Rows that were looked at.
        median: Tokens of the middle row.
        longest: Tokens of the longest row.
        most: ``max_length``.
        cut: Rows that are longer.
        cut_prompt: Those that lose some of what comes before the answer.
        cut_answer: Those that lose some of the answer, or of the text to classify.
        prompts: Rows that have something before the answer.
        notes: What else the encoder has to tell, in sentences.
    """

    rows: int
    median: int
    longest: int
    most: int
    cut: int
    cut_prompt: int
    cut_answer: int
    prompts: int
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Test rows that somebody else trains on.

    Attributes:
        rows: How many.
        test_rows: Of how many; a test set that all clients share counts once.
        clients: How many clients have one.
    """

    rows: int
    test_rows: int
    clients: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was read.

    Attributes:
        rows: Rows with something in them.
        clients: Clients they belong to; 0 where no row names one.
        least: Rows of the smallest client.
        middle: Rows of the median client.
        largest: Rows of the largest client.
        labels: Rows of each class, in class order; empty without labels.
        lengths: Tokens; None where they were not counted.
        used: Rows of each part, and clients, that go on; empty before rows are split.
        left: What does not go on.
        copies: Test rows that other clients train on; None where they were not counted.
        alike: Names that differ only in case or blanks, and what else is worth a sentence.
    """

    rows: int
    clients: int
    least: int
    middle: int
    largest: int
    labels: Mapping[str, int] = field(default_factory=dict)
    lengths: Lengths | None = None
    used: Mapping[str, int] = field(default_factory=dict)
    left: tuple[Left, ...] = ()
    copies: Copies | None = None
    alike: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        whole = asdict(self)
        lengths = None if self.lengths is None else {**whole["lengths"], "notes": list(self.lengths.notes)}
        lists = {"left": list(whole["left"]), "alike": list(self.alike)}
        return {**whole, "lengths": lengths, "used": dict(self.used) or None, **lists}


def reading_of(
    records: Sequence[Record],
    *,
    tokenizer: Any = None,
    form: LmForm | Literal["classify"] = "chat",
    max_length: int = 64,
    left: Iterable[Left] = (),
) -> Reading:
    """Count records.

    Args:
        records: All of them.
        tokenizer: Counts tokens; None: they are not counted.
        form: How a row is put before the model, or ``classify``.
        max_length: Tokens a row has at most.
        left: What was left out before.

    Raises:
        LichenError: if the rows cannot be put into that form.
    """
    sizes = Counter(column_of(records, "client"))
    sizes.pop("", None)
    often = sorted(sizes.values()) or [0]
    labels = Counter(str(label) for label in column_of(records, "label") if label is not None)
    classes = label_set(records)
    return Reading(
        rows=len(records),
        clients=len(sizes),
        least=often[0],
        middle=int(statistics.median(often)),
        largest=often[-1],
        labels={name: labels[name] for name in classes},
        lengths=None if tokenizer is None else lengths_of(records, tokenizer, form=form, max_length=max_length),
        left=merged(left),
        alike=(*alike("clients", sizes), *alike("classes", classes)),
    )


def lengths_of(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    form: LmForm | Literal["classify"],
    max_length: int,
    thinking: bool = False,
) -> Lengths | None:
    """How long rows are in tokens, and what ``max_length`` cuts of them; None without rows.

    Args:
        records: Of more than :data:`MOST_ENCODED`, so many are looked at.
        tokenizer: A transformers tokenizer.
        form: How a row is put before the model, or ``classify``.
        max_length: Tokens a row has at most.
        thinking: As :func:`lichen.data.batches.text.encode_lm` takes it.

    Raises:
        LichenError: if the rows cannot be put into that form.
    """
    count = min(len(records), MOST_ENCODED)
    if not count:
        return None
    some = [records[i * len(records) // count] for i in range(count)]
    notes: Counter[str] = Counter()
    if form == "classify":
        bare = [Record(client="", text=record.text) for record in some]
        total = np.array([len(ids) for ids, _ in encode_classify(bare, tokenizer, max_length=_ENDLESS, classes=())])
        notes["text cut"] = int((total > max_length).sum())
    else:
        whole = encode_lm(some, tokenizer, form=form, max_length=_ENDLESS, thinking=thinking)
        total = np.array([len(ids) for ids, _ in whole])
        encode_lm(some, tokenizer, form=form, max_length=max_length, thinking=thinking, notes=notes)
    cut_prompt, cut_answer = notes.pop("prompt cut", 0), notes.pop("text cut", 0)
    return Lengths(
        rows=count,
        median=int(np.median(total)),
        longest=int(total.max()),
        most=max_length,
        cut=int((total > max_length).sum()),
        cut_prompt=cut_prompt,
        cut_answer=cut_answer,
        prompts=0 if form in ("classify", "plain") else count,
        notes=tuple(sentences(notes, count)),
    )


def merged(left: Iterable[Left]) -> tuple[Left, ...]:
    """One entry a reason, in the order in which they first come, without those that left nothing and nobody out."""
    rows, clients = Counter[str](), Counter[str]()
    for one in left:
        rows[one.why] += one.rows
        clients[one.why] += one.clients
    return tuple(
        Left(why=why, rows=count, clients=clients[why]) for why, count in rows.items() if count or clients[why]
    )


def alike(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Which names differ only in case or blanks, in words.

    >>> alike("classes", ["ok", "OK ", "late"])
    ("classes 'OK ' and 'ok' differ only in case or blanks",)
    """
    same: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        same.setdefault(" ".join(unicodedata.normalize("NFKC", name).casefold().split()), []).append(name)
    found = [" and ".join(repr(name) for name in some) for some in same.values() if len(some) > 1]
    lines = [f"{what} {some} differ only in case or blanks" for some in found[:MOST_NAMED]]
    more = len(found) - MOST_NAMED
    return (*lines, *([f"and {more} more such groups of {what}"] if more > 0 else []))
