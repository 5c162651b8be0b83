"""Who masks with whom: how many neighbours each client needs, and a graph in which each has that many.

Each client masks with ``k`` others, and it and they hold the shares of its secrets, of which ``t`` open one. Positions
in the graph are a permutation that nobody chooses, so the neighbours of a client are a sample of all, and three things
have to hold, each but with chance ``2^-bits``:

- Who is neither dropped nor colluding stays connected, or the server learned the sum of each part. Neighbours lie
  within k/2 positions on a circle, so that only two runs of k/2 lost positions each cut it.
- No neighbourhood has t colluding clients, which could open a secret by themselves.
- No neighbourhood has fewer than t survivors, or the round is lost.

Always t is more than half of the holders: then not both of a client's secrets can be opened by holders of which each
opens one, whatever the server says to whom. Colluding holders open both; the bounds are for a server that says the same
to all.

References:
    James Bell, Kallista Bonawitz, Adrià Gascón, Tancrède Lepoint and Mariana Raykova. "Secure Single-Server Aggregation
    with (Poly)Logarithmic Overhead." CCS 2020. https://eprint.iacr.org/2020/704
    Frank Harary. "The Maximum Connectivity of a Graph." PNAS 48(7), 1962.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from lichen.core.masks.layout import frame, refused

__all__ = ["degree", "neighbours"]

_ALL_UP_TO = 16
"""Clients who all mask with one another: so many masks cost little, and a share of so few is but one or two of them."""


def degree(clients: int, *, dropped: float, colluding: float, bits: int = 40) -> tuple[int, int]:
    """Neighbours of each client, and how many of its ``k + 1`` holders open a secret.

    Args:
        clients: Of a round, at least 2.
        dropped: Share of them that may drop out, 0 to below 1.
        colluding: Share of them that may tell the server all they know.
        bits: Each bound may fail with chance ``2^-bits``, over all clients.

    Returns:
        ``(k, t)``. Of at most 16 clients, or where nothing less does, all others: ``k = clients - 1`` and
        ``t = (k + 1) // 2 + 1``. Else the least even k that does, and the least t for it.

    Raises:
        LichenError: if so many dropped or colluding clients can be met by no graph.

    >>> degree(5, dropped=0.2, colluding=0.2)
    (4, 3)
    """
    if clients < 2:
        raise refused(f"{clients} clients cannot hide one another", "invite more")
    if not (0 <= dropped < 1 and 0 <= colluding < 1 and bits >= 0):
        raise refused("dropped and colluding are shares of the clients", "use 0 to below 1, and bits from 0")
    lost, liars = math.ceil(dropped * clients - 1e-9), math.ceil(colluding * clients - 1e-9)
    for k in range(2, clients - 1, 2) if clients > _ALL_UP_TO else ():
        if (threshold := _threshold(clients, k, lost, liars, bits * math.log(2))) is not None:
            return k, threshold
    threshold = clients // 2 + 1
    if clients - lost < threshold or liars >= threshold:
        what = f"of {clients} clients, {lost} dropped and {liars} colluding ones leave no sum that can be opened"
        raise refused(what, "let fewer than half drop out, and fewer than half collude")
    return clients - 1, threshold


def _threshold(clients: int, k: int, lost: int, liars: int, margin: float) -> int | None:
    """The least threshold with which a graph of degree k will do; None: there is none. ``margin``: nats."""
    bad = min(lost + liars, clients)
    if bad >= k:
        cut = 2 * math.log(clients) - math.log(2) + _choose(clients - k, bad - k) - _choose(clients, bad)
        if cut > -margin:
            return None
    for threshold in range(k // 2 + 1, k + 1):
        if math.log(clients) + _tail(clients - 1, liars, k, threshold) <= -margin:
            enough = math.log(clients) + _tail(clients - 1, lost, k, k - threshold + 1) <= -margin
            return threshold if enough else None
    return None


def _tail(population: int, marked: int, drawings: int, least: int) -> float:
    """ln P[at least so many marked among the drawings], without replacement."""
    low, high = max(least, drawings - (population - marked), 0), min(marked, drawings)
    if low > high:
        return -math.inf
    terms = [_choose(marked, i) + _choose(population - marked, drawings - i) for i in range(low, high + 1)]
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms)) - _choose(population, drawings)


def _choose(n: int, r: int) -> float:
    """ln of the binomial coefficient."""
    return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)


def neighbours(clients: Sequence[int], k: int, seed: bytes) -> dict[int, tuple[int, ...]]:
    """Whom each client masks with: a Harary graph over a permutation that follows from the seed.

    Args:
        clients: Their numbers, each once.
        k: Neighbours of each; all others where there are no more, one fewer where both counts are odd.
        seed: Of the permutation.

    Returns:
        By client, its neighbours' numbers in ascending order; ``b`` is among those of ``a`` where ``a`` is among those
        of ``b``.

    >>> {client: len(others) for client, others in neighbours([5, 1, 9, 3], 2, b"seed").items()}
    {5: 2, 1: 2, 9: 2, 3: 2}
    """
    count = len(clients)
    if k >= count - 1:
        return {client: tuple(sorted(other for other in clients if other != client)) for client in clients}
    order = sorted(clients, key=lambda client: (hashlib.sha256(frame(seed, client)).digest(), client))
    steps = [step for distance in range(1, k // 2 + 1) for step in (distance, -distance)]
    if k % 2 and count % 2 == 0:
        steps.append(count // 2)
    around = {order[i]: tuple(sorted(order[(i + step) % count] for step in steps)) for i in range(count)}
    return {client: around[client] for client in clients}
