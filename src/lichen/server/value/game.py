"""Shares what a round gained out among its clients: exactly, by guided walks, or by leaving one out.

A game says for every coalition S of the P players its utility, v(S). The Shapley value of a player is its mean
marginal utility over all orders in which the players may come:

    φ_k = Σ_{S without k} |S|! (P − |S| − 1)! / P! · (v(S ∪ k) − v(S))

It is the one rule by which values add up to v(all) − v(∅) (efficiency), players that change every coalition alike have
equal values (symmetry), one that changes none has 0 (null player), and values of two games add up (linearity).

``exact`` asks for all 2^P coalitions; equal players have values of equal bits, and the players' names change no bit.
``guided`` walks along drawn orders. In a turn each player stands once at every place of an order and of its reverse, so
that all come first equally often, and what two players have in common falls to both; both ways pass the same P (P − 1)
coalitions. A walk ends where little is left to gain, and turns end where the values move little, so that their sum may
miss v(all) − v(∅) by what the walks left.
``leave_one_out`` is v(all) − v(all without k), which is symmetric and gives null players 0, and no more: of two equal
players each is needed the less for the other's being there.

References:
    Lloyd S. Shapley. "A Value for n-Person Games." Contributions to the Theory of Games II, 1953.
    Zelei Liu, Yuanyuan Chen, Han Yu, Yang Liu and Lizhen Cui. "GTG-Shapley: Efficient and Accurate Participant
    Contribution Evaluation in Federated Learning." ACM TIST, 2022. https://arxiv.org/abs/2109.02053
    Rory Mitchell, Joshua Cooper, Eibe Frank and Geoffrey Holmes. "Sampling Permutations for Shapley Value
    Estimation." JMLR 23(43), 2022. https://arxiv.org/abs/2104.12199 (an order and its reverse)

Legend: P players.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lichen.core.contracts.value import RoundValue, Utility
from lichen.core.errors import LichenError
from lichen.core.seeds import numpy_generator

__all__ = ["MOST_EXACT", "exact", "guided", "leave_one_out", "most_evaluations"]

MOST_EXACT = 12
"""Players for whom all coalitions are asked at most: 4,096 of them."""

_SMALL = 4
"""Players for whom a turn of walks asks for as many coalitions as there are."""

_MOST = 1000
"""Coalitions that guided walks ask for at most, once there was a turn."""

_BETWEEN = 1e-4
"""A round that changes the loss by less than this share of it is worth nothing to anybody."""

_INSIDE = 1e-2
"""A walk ends where less than this share of the round's gain is left."""

_MOVED = 0.05
"""Walks end where the values moved by less than this share of them in the last turn."""


def most_evaluations(kind: str, players: int) -> int:
    """Coalitions that a kind of value asks for at most, of so many players.

    >>> [most_evaluations(kind, 8) for kind in ("exact", "gtg", "loo", "first")]
    [256, 128, 10, 1]
    """
    if kind == "exact" or (kind == "gtg" and players <= _SMALL):
        return 1 << players
    if kind == "gtg":
        return max(players * (players - 1) + 2, min(1 << (players - 1), _MOST))
    return players + 2 if kind == "loo" else 1


def exact(players: Sequence[int], utility: Utility) -> RoundValue:
    """Shapley values from all coalitions.

    Args:
        players: Each once, in any order.
        utility: Of a coalition; asked once for each.

    Raises:
        LichenError: if there are more than :data:`MOST_EXACT`.

    >>> game = {frozenset(): 0.0, frozenset({1}): 1.0, frozenset({2}): 2.0, frozenset({1, 2}): 6.0}
    >>> exact((2, 1), game.__getitem__).value
    {1: 2.5, 2: 3.5}
    """
    order = sorted(players)
    count = len(order)
    if count > MOST_EXACT:
        raise LichenError(
            f"{count} clients in a round are 2^{count} coalitions; {MOST_EXACT} are the most",
            where="value.kind",
            fix="use gtg, or fewer federation.clients_per_round",
        )
    utilities = [
        utility(frozenset(k for place, k in enumerate(order) if mask >> place & 1)) for mask in range(1 << count)
    ]
    value = {}
    for place, player in enumerate(order):
        gains_by_size: list[list[float]] = [[] for _ in order]
        for mask, without in enumerate(utilities):
            if not mask >> place & 1:
                gains_by_size[mask.bit_count()].append(utilities[mask | 1 << place] - without)
        # Sums are exact before they are rounded, so that equal players, whose terms come in another order, stay equal.
        means = (math.fsum(gains) / math.comb(count - 1, size) for size, gains in enumerate(gains_by_size))
        value[player] = math.fsum(means) / count
    return RoundValue(value=value, before=utilities[0], after=utilities[-1], evaluations=len(utilities))


def guided(players: Sequence[int], utility: Utility, *, seed: int) -> RoundValue:
    """Shapley values by GTG-Shapley's guided and truncated walks; exact for 4 players or fewer.

    Args:
        players: Each once, in any order.
        utility: Of a coalition; asked once for each, and of 6 players or more for at most half of all.
        seed: Of the orders.
    """
    order = sorted(players)
    count = len(order)
    if count <= _SMALL:
        return exact(order, utility)
    known: dict[frozenset[int], float] = {}

    def of(coalition: frozenset[int]) -> float:
        if coalition not in known:
            known[coalition] = utility(coalition)
        return known[coalition]

    before, after = of(frozenset()), of(frozenset(order))
    gains: dict[int, list[float]] = {player: [] for player in order}
    value = dict.fromkeys(order, 0.0)
    random, most, turn = numpy_generator(seed, "walks"), min(1 << (count - 1), _MOST), count * (count - 1)
    moved = abs(after - before) > _BETWEEN * abs(before)
    while moved and (not gains[order[0]] or len(known) + turn <= most):
        sampled = [order[place] for place in random.permutation(count)]
        for way in (sampled, sampled[::-1]):
            for first in range(count):
                _walk(way[first:] + way[:first], of, before, after, gains)
        former, value = value, {player: math.fsum(mine) / len(mine) for player, mine in gains.items()}
        change = math.fsum(abs(value[player] - former[player]) for player in order)
        moved = change >= _MOVED * math.fsum(abs(x) for x in value.values())
    return RoundValue(value=value, before=before, after=after, evaluations=len(known))


def _walk(order: Sequence[int], of: Utility, before: float, after: float, gains: Mapping[int, list[float]]) -> None:
    """What each player adds in this order; nothing, once little is left to add."""
    inside, now = frozenset[int](), before
    for player in order:
        inside |= {player}
        ended = abs(after - now) <= _INSIDE * abs(after - before)
        then = now if ended else of(inside)
        gains[player].append(then - now)
        now = then


def leave_one_out(players: Sequence[int], utility: Utility) -> RoundValue:
    """What the round would lose without each player.

    Args:
        players: Each once, in any order.
        utility: Of a coalition; asked once for P + 2 of them.

    >>> leave_one_out((1, 2), lambda coalition: float(len(coalition) == 2)).value
    {1: 1.0, 2: 1.0}
    """
    everyone = frozenset(players)
    before, after = utility(frozenset()), utility(everyone)
    value = {player: after - utility(everyone - {player}) for player in sorted(everyone)}
    return RoundValue(value=value, before=before, after=after, evaluations=len(value) + 2)
