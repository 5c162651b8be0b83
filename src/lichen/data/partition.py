"""Who holds which row, and what is kept back for validation and test.

Natural clients where the data have them (:func:`by_client`), label skew where they have none
(:func:`dirichlet`), an even spread to compare with (:func:`iid`). :func:`split` parts one client's rows
without tearing a conversation apart and without leaving a text of training in what measures it.

References:
    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019,
    arXiv:1905.12022 (each class is dealt out by one Dirichlet draw). Lee et al., "Deduplicating Training
    Data Makes Language Models Better", ACL 2022, arXiv:2107.06499 (why duplicates spoil a test).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.record import Record
from lichen.data.table import column_of

__all__ = ["by_client", "dirichlet", "iid", "normalise", "split"]


def by_client(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Row numbers of each client (int64, ascending), clients in name order.

    >>> by_client([Record(client="b", text="1"), Record(client="a", text="2")])
    {'a': array([1]), 'b': array([0])}
    """
    rows: dict[str, list[int]] = {}
    for i, client in enumerate(column_of(records, "client")):
        rows.setdefault(client, []).append(i)
    return {client: np.array(rows[client], dtype=np.int64) for client in sorted(rows)}


def _check_enough(rows: int, clients: int, each: int) -> None:
    if clients < 1:
        raise LichenError("there must be at least one client", where="data.clients", fix="use a number above 0")
    if rows < clients * each:
        raise LichenError(
            f"{rows} rows are too few for {clients} clients with {each} each",
            where="data.clients",
            fix="use fewer clients or more rows",
        )


def iid(n: int, *, clients: int, seed: int) -> list[np.ndarray]:
    """Deal ``n`` rows out at random, evenly to within one row.

    Returns:
        One int64 array of ascending row numbers a client; together every row exactly once.

    Raises:
        LichenError: if a client would get none.
    """
    _check_enough(n, clients, 1)
    order = numpy_generator(seed, "iid").permutation(n)
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, clients)]


def dirichlet(
    labels: Sequence[int] | Sequence[str] | np.ndarray,
    *,
    clients: int,
    alpha: float,
    seed: int,
    min_examples: int = 1,
) -> list[np.ndarray]:
    """Deal rows out class by class, shares drawn from Dirichlet(``alpha``): small alpha, strong skew.

    Clients short of ``min_examples`` are then filled up with rows of the largest client.

    Args:
        labels: Class of each row.
        clients: How many clients.
        alpha: Concentration, above 0; 0.1 is strong skew, 100 is nearly even.
        seed: Seed of the draw.
        min_examples: Rows every client has at least.

    Returns:
        One int64 array of ascending row numbers a client; together every row exactly once.

    Raises:
        LichenError: if alpha is not positive, or the rows are too few.
    """
    y = np.asarray(labels)
    if not (np.isfinite(alpha) and alpha > 0):
        raise LichenError(f"alpha is {alpha}", where="data.alpha", fix="use a number above 0, such as 0.5")
    _check_enough(len(y), clients, max(min_examples, 0))
    generator = numpy_generator(seed, "dirichlet")
    parts: list[list[int]] = [[] for _ in range(clients)]
    for value in np.unique(y):
        rows = generator.permutation(np.flatnonzero(y == value))
        share = generator.dirichlet(np.full(clients, alpha))
        if not np.isfinite(share).all():  # a tiny alpha underflows; its limit is one client that takes the class
            share = np.eye(clients)[generator.integers(clients)]
        cuts = np.rint(np.cumsum(share)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        while len(part) < min_examples:
            richest = max(parts, key=len)
            part.append(richest.pop(int(generator.integers(len(richest)))))
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def normalise(text: str) -> str:
    """Text with case, accents' encoding, punctuation and spacing evened out, to find near-exact copies.

    Text without any letter or digit keeps its signs.

    >>> normalise("  Hello,   WORLD! ")
    'hello world'
    >>> normalise(":-)")
    ':-)'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or " ".join(folded.split())


def _key(record: Record, duplicates: str) -> str:
    if record.features is not None:
        return hashlib.blake2b(record.features.tobytes(), digest_size=16).hexdigest()
    text = record.text or "\n".join(turn["content"] for turn in record.messages)
    return normalise(text) if duplicates == "text" else f"{normalise(record.prompt)}\x1f{normalise(text)}"


def split(
    records_of_client: Sequence[Record],
    *,
    valid: float,
    test: float,
    seed: int,
    by: Literal["group", "row"] = "group",
    duplicates: Literal["text", "pair"] = "text",
) -> tuple[list[Record], list[Record], list[Record]]:
    """Part one client's rows into ``(train, valid, test)``.

    Units are dealt whole: groups, or rows (all copies of one text are one unit). The largest unit trains;
    valid and test get at least one unit each where there are enough, test first. Rows of valid and
    test whose normalised text also stands in train are dropped.

    Args:
        records_of_client: Rows of one client.
        valid: Share of rows for validation, in [0, 1).
        test: Share of rows for test, in [0, 1).
        seed: Seed of the draw; give each client its own.
        by: Keep groups together, or deal out single rows.
        duplicates: What makes two rows copies: the ``text`` alone, or the ``pair`` of prompt and text
            (for short answers that many prompts share).

    Raises:
        LichenError: if the shares do not leave anything to train on.
    """
    if not (0 <= valid < 1 and 0 <= test < 1 and valid + test < 1):
        raise LichenError(f"shares are {valid} and {test}", where="data.split", fix="use shares that sum below 1")
    keys = [_key(record, duplicates) for record in records_of_client]
    units: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records_of_client):
        grouped = by == "group" and record.group
        units.setdefault(("group", record.group) if grouped else ("text", keys[i]), []).append(i)
    pool = list(units.values())
    order = numpy_generator(seed, "split").permutation(len(pool))
    pool = [pool[i] for i in order]
    if not pool:
        return [], [], []
    largest = max(range(len(pool)), key=lambda i: len(pool[i]))
    kept, pool = pool[largest], pool[:largest] + pool[largest + 1 :]
    total = len(records_of_client)
    test_rows, pool = _draw(pool, test * total)
    valid_rows, pool = _draw(pool, valid * total)
    train_rows = kept + [i for unit in pool for i in unit]
    learned = {keys[i] for i in train_rows}

    def rows(numbers: list[int], clean: bool) -> list[Record]:
        return [records_of_client[i] for i in sorted(numbers) if not (clean and keys[i] in learned)]

    return rows(train_rows, False), rows(valid_rows, True), rows(test_rows, True)


def _draw(pool: list[list[int]], target: float) -> tuple[list[int], list[list[int]]]:
    """Units in order as long as each brings the count nearer to ``target`` rows; the smallest if none does."""
    if target <= 0 or not pool:
        return [], pool
    taken: list[int] = []
    rest: list[list[int]] = []
    for unit in pool:
        if len(taken) + len(unit) / 2 <= target:
            taken = taken + unit
        else:
            rest.append(unit)
    if not taken:
        smallest = min(range(len(rest)), key=lambda i: len(rest[i]))
        taken = rest.pop(smallest)
    return taken, rest
