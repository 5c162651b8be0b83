"""Secret numbers are normal and on their grid, follow from key and labels alone, and their key is read by nobody."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lichen.core.errors import LichenError
from lichen.core.secret.discrete_gaussian import discrete_gaussian
from lichen.core.secret.randomness import SecretRandomness, Stream, secret_key

MILLION = 10**6


def stream(*labels: int | str, seed: int = 0) -> Stream:
    return SecretRandomness.of_seed(seed).stream(*labels)


def test_a_million_numbers_are_normal() -> None:
    x_N = stream("noise").normal((MILLION,), 1.16).numpy() / 1.16
    edges = stats.norm.ppf(np.linspace(0, 1, 101))
    assert stats.chisquare(np.histogram(x_N, edges)[0]).pvalue > 1e-4
    assert stats.kstest(x_N, "norm").pvalue > 1e-4
    assert abs(x_N.std() - 1) < 0.01
    # Half of this noise, or numbers of another shape, would be seen.
    assert stats.kstest(x_N / 1.02, "norm").pvalue < 1e-4


@pytest.mark.parametrize("sigma", [1, 3])
def test_every_integer_comes_as_often_as_the_formula_says(sigma: int) -> None:
    y_N = discrete_gaussian(stream("small", sigma).words, MILLION, sigma)
    k = np.arange(-40 * sigma, 40 * sigma + 1)
    p = np.exp(-(k**2) / (2 * sigma**2))
    often = MILLION * p / p.sum() >= 10
    found = np.array([(y_N == one).sum() for one in k[often]])
    wanted = MILLION * p[often] / p.sum()
    rest = MILLION - found.sum(), MILLION - wanted.sum()
    assert stats.chisquare([*found, rest[0]], [*wanted, rest[1]]).pvalue > 1e-4


def test_neighbouring_numbers_are_unrelated_and_low_bits_are_fair() -> None:
    y_N = stream("bits").units(MILLION, 1.0).numpy()
    assert abs(np.corrcoef(y_N[1:].astype(float), y_N[:-1].astype(float))[0, 1]) < 0.005
    for bit in range(12):
        assert stats.binomtest(int((y_N >> bit & 1).sum()), MILLION).pvalue > 1e-4


def test_numbers_lie_on_the_grid_and_go_on_where_they_ended() -> None:
    one, two = stream("a"), stream("a")
    x = one.normal((3, 5), 0.5)
    assert x.shape == (3, 5)
    assert x.dtype == torch.float64
    assert torch.equal(x * 2.0**40, (x * 2.0**40).round())
    assert torch.equal(two.units(15, 0.5), (x * 2.0**40).long().flatten())
    assert not torch.equal(one.units(15, 0.5), two.units(15, 0.5) * 0)
    assert not torch.equal(one.normal((15,), 0.5), x.flatten())


def test_coins_fall_by_their_rate() -> None:
    coin_N = stream("coins").bernoulli(0.3, MILLION)
    assert coin_N.dtype == torch.bool
    assert stats.binomtest(int(coin_N.sum()), MILLION, 0.3).pvalue > 1e-4
    assert bool(stream("coins").bernoulli(1.0, 5).all())
    assert not bool(stream("coins").bernoulli(0.0, 1000).any())


def test_key_and_labels_alone_choose_the_numbers() -> None:
    def first(seed: int, *labels: int | str) -> tuple[int, ...]:
        return tuple(stream(*labels, seed=seed).units(4, 1.0).tolist())

    labels: list[tuple[int | str, ...]] = [("a", 1), ("a", "1"), ("a1",), ("a", 1, 0), ("a", 2), (1, "a")]
    assert first(3, "a", 1) == first(3, "a", 1)
    assert len({first(seed, *some) for seed in (3, 4) for some in labels}) == 2 * len(labels)


def test_a_key_is_drawn_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "privacy.key"
    one = secret_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not one.seeded
    assert SecretRandomness.of_seed(0).seeded
    again, other = secret_key(path), secret_key(tmp_path / "other.key")
    drawn = [some.stream("x").units(4, 1.0).tolist() for some in (one, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert os.listdir(path.parent) == ["privacy.key"]
    path.chmod(0o644)
    with pytest.raises(LichenError, match="others can read"):
        secret_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(LichenError, match="no key"):
        secret_key(path)


def test_refuses_what_the_grid_cannot_hold() -> None:
    for sigma in (1e-9, 1e9, float("nan"), float("inf")):
        with pytest.raises(LichenError, match="grid"):
            stream("x").units(1, sigma)
    assert stream("x").units(3, 0.0).tolist() == [0, 0, 0]
    with pytest.raises(LichenError, match="chance"):
        stream("x").bernoulli(1.5, 1)
    with pytest.raises(LichenError, match="bytes"):
        SecretRandomness(b"")
