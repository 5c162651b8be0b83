"""Measures what masks take on this machine, in parts that are multiplied.

Four clients talk over one number, one client deals its shares to as many neighbours as it has, one secret is put
together, and one stream is added to as many numbers as a message has, or to some of them.

Legend: n clients of a round, k neighbours of each, N numbers of a message.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from lichen.core.masks.closing import Closing
from lichen.core.masks.keys import public_of
from lichen.core.masks.opening import good_shares
from lichen.core.masks.pairs import mask_key
from lichen.core.masks.party import Party
from lichen.core.masks.shares import combine
from lichen.core.masks.streams import add_stream

__all__ = ["Pace", "pace_of"]

T = TypeVar("T")

FEW = 4
"""Clients that talk to be timed."""

AT_ONCE = 0.1
"""Seconds from which a part is timed once and not three times."""

SOME = 1 << 20
"""Numbers that a stream is timed on, at most: the seconds of more grow with their count."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Talk:
    """Seconds for one neighbour of one client: to pass its box on, to open that, to open its share, to check that.

    And those of a client that puts its numbers under ``FEW`` masks.
    """

    passing: float
    receiving: float
    masking: float
    opening: float
    checking: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Seconds of the parts.

    Attributes:
        neighbours: k.
        advertising: Of one client.
        sharing: Of one client, to all k.
        talk: For one neighbour of one client.
        stream: Of a mask over N numbers.
        adding: N numbers to N others.
        secret: Of a secret put together from shares that opened none before.
        known: Of one whose shares are those that opened another.
        agreeing: On the key of a mask, of two clients.
    """

    neighbours: int
    advertising: float
    sharing: float
    talk: _Talk
    stream: float
    adding: float
    secret: float
    known: float
    agreeing: float

    def stages(self) -> tuple[float, float, float, float]:
        """Of one client: keys, shares, the masked sum without training, the opening."""
        k = self.neighbours
        masked = k * self.talk.receiving + max(0.0, self.talk.masking + (k + 1 - FEW) * self.stream)
        return self.advertising, self.sharing, masked, k * self.talk.opening

    def server(self, clients: int, gone: int) -> float:
        """Of the server until the sum is open, waiting apart.

        Args:
            clients: n.
            gone: Of them, those that have fallen silent before the masked sum.
        """
        k, there = self.neighbours, clients - gone
        pairs = gone * k * there / max(1, clients - 1)  # masks between one who is gone and one who is there
        passed = clients * k * self.talk.passing + there * self.adding
        unsealed = there * (k + 1) * self.talk.checking + clients * (self.secret if gone else self.known)
        return passed + unsealed + (there + pairs) * self.stream + pairs * self.agreeing


def pace_of(neighbours: int, threshold: int, numbers: int) -> Pace:
    """Measure.

    Args:
        neighbours: k.
        threshold: Shares that open a secret.
        numbers: N.
    """
    units_N = np.zeros(max(1, min(numbers, SOME)), dtype=np.int64)
    times = numbers / len(units_N)
    _talk(units_N[:1])  # the first loads what the others use
    talks = [_talk(units_N), _talk(units_N)]
    parts = {part.name: min(getattr(one, part.name) for one in talks) for part in fields(_Talk)}
    parts["masking"] *= times
    advertising, sharing = _dealing(neighbours, threshold)
    total_N, key = np.zeros_like(units_N), secrets.token_bytes(32)
    shares = {x: secrets.token_bytes(32) for x in range(1, threshold + 1)}
    combine(shares)
    return Pace(
        neighbours=neighbours,
        advertising=advertising,
        sharing=sharing,
        talk=_Talk(**parts),
        stream=times * _least(lambda: add_stream(units_N, key, 1)),
        adding=times * _least(lambda: np.add(total_N, units_N, out=total_N)),
        secret=_least(lambda: combine(_others(shares))),
        known=_least(lambda: combine(shares)),
        agreeing=_least(lambda: mask_key(b"plan", 0, key, 1, public_of(key))),
    )


def _clocked(go: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    out = go()
    return time.perf_counter() - start, out


def _least(go: Callable[[], object]) -> float:
    best = _clocked(go)[0]
    return min(best, *(_clocked(go)[0] for _ in range(2))) if best < AT_ONCE else best


def _others(shares: Mapping[int, bytes]) -> dict[int, bytes]:
    """As many shares, by numbers that have hardly opened a secret before: what each counts is not known yet."""
    xs = random.sample(range(1, 2 * len(shares) + 32), len(shares))
    return dict(zip(sorted(xs), shares.values(), strict=True))


def _dealing(neighbours: int, threshold: int) -> tuple[float, float]:
    """Seconds in which a client advertises, and shares with all its neighbours."""

    def party(client: int) -> Party:
        return Party(client, b"plan", secrets.token_bytes(32), k=neighbours, threshold=threshold)

    others = range(1, neighbours + 1)
    adverts = np.stack([party(client).advertise() for client in others])
    one = party(0)
    return _least(lambda: party(0).advertise()), _clocked(lambda: one.share(others, adverts))[0]


def _talk(units_N: NDArray[np.int64]) -> _Talk:
    """A few clients talk, each with all others."""
    context, everyone, pairs = secrets.token_bytes(8), range(FEW), FEW * (FEW - 1)
    k, threshold = FEW - 1, FEW // 2 + 1
    closing = Closing(context, k=k, threshold=threshold)
    parties = [Party(c, context, secrets.token_bytes(32), k=k, threshold=threshold) for c in everyone]
    adverts = np.stack([party.advertise() for party in parties])
    announced, (ids, around) = _clocked(lambda: closing.keys(everyone, adverts))
    shared = [party.share(ids[c].tolist(), around[c]) for c, party in enumerate(parties)]
    sealed, commitments = (np.stack(arrays) for arrays in zip(*shared, strict=True))
    passed, (boxes, present) = _clocked(lambda: closing.shares(everyone, sealed, commitments))

    def receive() -> None:
        for c, party in enumerate(parties):
            party.receive(boxes[c], present[c])

    received, _ = _clocked(receive)
    masking, masked_CN = _clocked(lambda: [party.mask(units_N) for party in parties])
    closing.masked(everyone, np.stack(masked_CN))
    alive = closing.alive(everyone)
    opening, rows = _clocked(lambda: [party.open(alive[c]) for c, party in enumerate(parties)])
    graph = {client: tuple(ids[client].tolist()) for client in everyone}
    dealt = {client: commitments[client] for client in everyone}
    checked, _ = _clocked(lambda: good_shares(context, graph, dealt, everyone, dict(enumerate(rows))))
    return _Talk(
        passing=(announced + passed) / pairs,
        receiving=received / pairs,
        masking=masking / FEW,
        opening=opening / pairs,
        checking=checked / FEW**2,
    )
