"""Laws of values: they add up, equal players are equal, null players get nothing, and names do not matter.

Legend: P players, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.contracts.value import RoundValue, Utility
from lichen.core.errors import LichenError
from lichen.server.value.game import MOST_EXACT, exact, guided, leave_one_out

RULES: dict[str, Callable[..., RoundValue]] = {
    "exact": exact,
    "gtg": lambda players, utility: guided(players, utility, seed=3),
    "loo": leave_one_out,
}
GAMES = st.tuples(st.integers(0, 10**6), st.integers(2, 8))


def drawn(seed: int, players: int, *, twins: bool = False, null: bool = False) -> Utility:
    """Any number for every coalition; players 0 and 1 alike, or the last one of no matter."""
    table: dict[frozenset[int], float] = {}

    def utility(coalition: frozenset[int]) -> float:
        if null:
            coalition -= {players - 1}
        if twins and coalition & {0, 1} == {1}:
            coalition = coalition - {1} | {0}
        key = sum(1 << player for player in coalition)
        if coalition not in table:
            table[coalition] = float(np.random.default_rng([seed, key]).normal() - 3)
        return table[coalition]

    return utility


def smooth(seed: int, players: int) -> Utility:
    """A round of training as a game: shares of changes, most of which point one way, and a loss that bends."""
    rng = np.random.default_rng(seed)
    goal_D = rng.normal(size=6)
    change_PD = 0.8 * goal_D + 0.4 * rng.normal(size=(players, 6))
    share_P = rng.dirichlet(np.full(players, 3.0))

    def utility(coalition: frozenset[int]) -> float:
        moved_D = sum((share_P[k] * change_PD[k] for k in coalition), np.zeros(6))
        return -math.log1p(math.exp(1.0)) - float(np.log1p(((goal_D - moved_D) ** 2).sum()))

    return utility


def renamed(utility: Utility, names: Mapping[int, int]) -> Utility:
    back = {name: player for player, name in names.items()}
    return lambda coalition: utility(frozenset(back[name] for name in coalition))


@settings(max_examples=30, deadline=None)
@given(GAMES)
def test_exact_values_add_up_and_are_the_mean_over_all_orders(game: tuple[int, int]) -> None:
    seed, players = game
    utility = drawn(seed, players)
    found = exact(range(players), utility)
    assert abs(found.gap) <= 1e-12
    assert found.evaluations == 2**players
    if players <= 5:
        gains: dict[int, list[float]] = {player: [] for player in range(players)}
        for order in permutations(range(players)):
            for place, player in enumerate(order):
                gains[player].append(utility(frozenset(order[: place + 1])) - utility(frozenset(order[:place])))
        for player, mine in gains.items():
            assert found.value[player] == pytest.approx(math.fsum(mine) / len(mine), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(GAMES, st.permutations(range(8)))
def test_names_and_order_change_no_bit(game: tuple[int, int], order: list[int]) -> None:
    seed, players = game
    utility, names = drawn(seed, players), {player: 10 + name for player, name in enumerate(order[:players])}
    for rule in (exact, leave_one_out):
        plain = rule(range(players), utility)
        other = rule(list(names.values()), renamed(utility, names))
        assert {player: other.value[name] for player, name in names.items()} == dict(plain.value)
    for rule in RULES.values():
        assert rule(range(players), utility) == rule(list(range(players))[::-1], utility)


@settings(max_examples=30, deadline=None)
@given(GAMES)
def test_equal_players_are_equal_and_null_players_get_nothing(game: tuple[int, int]) -> None:
    seed, players = game
    for rule in (exact, leave_one_out):
        value = rule(range(players), drawn(seed, players, twins=True)).value
        assert value[0] == value[1]
    for rule in RULES.values():
        assert rule(range(players), drawn(seed, players, null=True)).value[players - 1] == 0.0


@settings(max_examples=20, deadline=None)
@given(GAMES)
def test_values_of_two_games_add_up(game: tuple[int, int]) -> None:
    seed, players = game
    one, two = drawn(seed, players), drawn(seed + 1, players)
    for rule in (exact, leave_one_out):
        both = rule(range(players), lambda coalition: one(coalition) + two(coalition)).value
        alone = [rule(range(players), utility).value for utility in (one, two)]
        assert all(both[k] == pytest.approx(alone[0][k] + alone[1][k], abs=1e-12) for k in range(players))


@settings(max_examples=40, deadline=None)
@given(GAMES)
def test_guided_walks_come_near_exact_values_with_fewer_coalitions(game: tuple[int, int]) -> None:
    seed, players = game
    utility = smooth(seed, players)
    true, found = exact(range(players), utility), guided(range(players), utility, seed=seed)
    size = sum(abs(value) for value in true.value.values())
    assert sum(abs(found.value[k] - true.value[k]) for k in true.value) <= 0.1 * size
    assert abs(found.gap) <= 0.011 * abs(true.after - true.before)
    assert found.evaluations <= (2**players if players < 6 else 2 ** (players - 1))
    assert (found.before, found.after) == (true.before, true.after)


def test_no_coalition_is_asked_for_twice_by_walks() -> None:
    utility, asked = drawn(1, 9), list[frozenset[int]]()

    def counted(coalition: frozenset[int]) -> float:
        asked.append(coalition)
        return utility(coalition)

    assert guided(range(9), counted, seed=0).evaluations == len(asked) == len(set(asked)) <= 2**8


def test_a_round_that_moves_nothing_is_worth_nothing_to_anybody() -> None:
    found = guided(range(9), lambda coalition: -2.0 - 1e-5 * len(coalition), seed=0)
    assert (set(found.value.values()), found.evaluations) == ({0.0}, 2)


def test_too_many_for_all_coalitions_are_named_with_what_takes_them() -> None:
    with pytest.raises(LichenError, match="13 clients") as error:
        exact(range(MOST_EXACT + 1), lambda _: 0.0)
    assert "gtg" in error.value.fix
    assert guided(range(MOST_EXACT + 1), smooth(0, MOST_EXACT + 1), seed=0).evaluations <= 1000


def test_a_round_value_goes_through_json_whole() -> None:
    found = exact(range(3), drawn(5, 3))
    assert RoundValue.load(found.dump()) == found
