"""Where every client comes to every round, no noise that is correlated over rounds is worth having: what plans say."""

from __future__ import annotations

import correlated
import numpy as np
import pytest


@pytest.mark.parametrize("rounds", [2, 8, 32])
def test_a_tree_leaves_no_less_noise_than_plain_noise_after_any_round(rounds: int) -> None:
    plain, tree = correlated.noise_of(correlated.plain(rounds)), correlated.noise_of(correlated.tree(rounds))
    assert (tree >= plain * (1 - 1e-9)).all()
    assert tree[:-1].sum() > plain[:-1].sum()


@pytest.mark.parametrize("rounds", [2, 8, 32])
def test_after_the_last_round_nothing_leaves_less_than_plain_noise(rounds: int) -> None:
    random = np.random.default_rng(rounds)
    least, plain = correlated.least(rounds), correlated.noise_of(correlated.plain(rounds))
    assert plain[-1] == pytest.approx(least[-1])
    for factor in (
        *(correlated.tree(rounds), correlated.banded(rounds)),
        *(np.tril(random.random((rounds, rounds))) + np.eye(rounds) for _ in range(20)),
    ):
        assert (correlated.noise_of(factor) >= least * (1 - 1e-9)).all()
