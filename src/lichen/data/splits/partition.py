"""Partitions records into clients: natural ones, IID or Dirichlet.

:func:`by_client` takes the data's own owners, :func:`dirichlet` draws label skew, :func:`iid` an even spread to
compare with. What is kept back for validation and test: :mod:`lichen.data.splits.split`.

References:
    Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019,
    arXiv:1905.12022 (each class is dealt out by one Dirichlet draw).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator
from lichen.data.sources.record import Record
from lichen.data.sources.table import column_of

__all__ = ["by_client", "dirichlet", "iid"]


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
        raise LichenError(
            "there must be at least one client", where="data.partition.clients", fix="use a number above 0"
        )
    if rows < clients * each:
        raise LichenError(
            f"{rows} rows are too few for {clients} clients with {each} each",
            where="data.partition.clients",
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
        raise LichenError(f"alpha is {alpha}", where="data.partition.alpha", fix="use a number above 0, such as 0.5")
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
