"""Published privacy numbers to the last digit, an oracle of its own, and what an ε is said to be of."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.transforms.privacy import Accountant, Gaussian, Sampled, Statement, account, delta_for, epsilon, sigma_for

HERE = importlib.util.find_spec("dp_accounting") is not None
counts = pytest.mark.skipif(not HERE, reason="dp-accounting is not installed")


def balle_wang(sigma: float, delta: float) -> float:
    """ε of one plain Gaussian of sensitivity 1, from the exact δ(ε), by bisection."""

    def delta_of(e: float) -> float:
        a, b = 0.5 / sigma - e * sigma, -0.5 / sigma - e * sigma
        tail = math.erfc(-b / math.sqrt(2)) / 2
        return math.erfc(-a / math.sqrt(2)) / 2 - (math.exp(e) * tail if tail else 0.0)

    low, high = 0.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high


YELP, PUBMED = 1_939_290, 75_316


@counts
@pytest.mark.parametrize(
    ("rows", "sigma", "told"),
    [
        (YELP, 15.34, "1.004"),
        (YELP, 8.03, "2.002"),
        (YELP, 4.24, "4.005"),
        (PUBMED, 13.26, "0.999"),
        (PUBMED, 7.01, "1.997"),
        (PUBMED, 3.75, "3.999"),
    ],
)
def test_gives_the_epsilons_that_aug_pe_prints(rows: int, sigma: float, told: str) -> None:
    assert f"{epsilon([Gaussian(sigma, steps=10)], delta_for(rows)):.3f}" == told


@counts
@pytest.mark.parametrize(("sigma", "told"), [(11.3, "1.287"), (2.31, "7.579")])
def test_gives_the_epsilons_that_pre_text_prints(sigma: float, told: str) -> None:
    assert f"{epsilon([Gaussian(sigma, steps=11)], 3e-6, accountant='rdp'):.3f}" == told


def test_the_oracle_gives_the_published_numbers_without_the_library() -> None:
    for rows, sigma, told in ((YELP, 15.34, "1.004"), (YELP, 4.24, "4.005"), (PUBMED, 7.01, "1.997")):
        assert f"{balle_wang(sigma / math.sqrt(10), delta_for(rows)):.3f}" == told


@counts
@given(sigma=st.floats(3, 12), steps=st.integers(1, 6), delta=st.sampled_from([1e-3, 1e-5, 1e-8]))
@settings(max_examples=8)
def test_equals_the_analytic_gaussian_from_above(sigma: float, steps: int, delta: float) -> None:
    exact = balle_wang(sigma / math.sqrt(steps), delta)
    assert exact - 1e-6 <= epsilon([Gaussian(sigma, steps=steps)], delta) <= exact + 2e-3
    assert epsilon([Gaussian(sigma, steps=steps)], delta, accountant="rdp") >= exact - 1e-6


@counts
def test_only_the_ratio_of_noise_to_sensitivity_counts_whatever_the_neighbours() -> None:
    one = epsilon([Gaussian(4.0, steps=3)], 1e-5)
    assert epsilon([Gaussian(8.0, sensitivity=2.0, steps=3)], 1e-5) == one
    assert epsilon([Gaussian(4.0, steps=3)], 1e-5, adjacency="replace") == one
    assert epsilon([Gaussian(4.0), Gaussian(4.0, steps=2)], 1e-5) == pytest.approx(one, abs=1e-3)
    assert epsilon([Gaussian(4.0, steps=3)], 1e-5, adjacency="replace", accountant="rdp") == pytest.approx(
        epsilon([Gaussian(4.0, steps=3)], 1e-5, accountant="rdp"), abs=1e-12
    )


@counts
def test_sampling_amplifies_and_everybody_is_no_sampling() -> None:
    whole = epsilon([Gaussian(4.0, steps=5)], 1e-5)
    assert epsilon([Sampled(Gaussian(4.0, steps=5), rate=1.0)], 1e-5) == whole
    tenth = epsilon([Sampled(Gaussian(4.0, steps=5), rate=0.1)], 1e-5)
    assert 0 < tenth < whole / 5
    assert tenth <= epsilon([Sampled(Gaussian(4.0, steps=5), rate=0.1)], 1e-5, accountant="rdp")


@counts
@pytest.mark.parametrize(
    ("target", "rate", "accountant"), [(1.0, 1.0, "pld"), (4.0, 1.0, "pld"), (0.5, 0.2, "pld"), (1.0, 1.0, "rdp")]
)
def test_sigma_for_keeps_the_promise_and_wastes_little(target: float, rate: float, accountant: Accountant) -> None:
    sigma = sigma_for(target, 1e-5, 4, sensitivity=3.0, rate=rate, within=0.02, accountant=accountant)

    def spent(noise: float) -> float:
        event = Sampled(Gaussian(noise, sensitivity=3.0, steps=4), rate=rate)
        return epsilon([event], 1e-5, accountant=accountant)

    assert spent(sigma) <= target < spent(sigma * 0.97)


def test_no_noise_is_no_privacy_and_nothing_released_costs_nothing() -> None:
    assert epsilon([Gaussian(0.0, steps=2), Gaussian(5.0)], 1e-5) == math.inf
    assert epsilon([Gaussian(0.0, steps=0)], 1e-5) == 0.0
    told = account([Gaussian(0.0)], 1e-5, unit="client", adjacency="replace")
    assert math.isinf(told.epsilon)
    assert str(told).startswith("no differential privacy for replacing one client")


def test_what_is_printed_is_rounded_up() -> None:
    said = Statement(2.0001, delta=1e-5, adjacency="add-or-remove", unit="client", accountant="rdp")
    assert str(said) == "(2.001, 1e-05)-differential privacy for adding or removing one client (RDP accountant)"


def test_refuses_what_means_nothing() -> None:
    for bad in ({"sigma": -1.0}, {"sigma": math.nan}, {"sigma": 1, "sensitivity": 0}, {"sigma": 1, "steps": -1}):
        with pytest.raises(LichenError):
            Gaussian(**bad)
    with pytest.raises(LichenError, match="rate"):
        Sampled(Gaussian(1.0), rate=0.0)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(LichenError, match="chance"):
            epsilon([Gaussian(1.0)], delta)
    with pytest.raises(LichenError, match="added or removed"):
        epsilon([Sampled(Gaussian(1.0), rate=0.5)], 1e-5, adjacency="replace")
    with pytest.raises(LichenError, match="added or removed"):  # a statement cannot claim it either
        account([Sampled(Gaussian(1.0), rate=0.5)], 1e-5, unit="client", adjacency="replace")
    with pytest.raises(LichenError, match="adjacency"):
        epsilon([Gaussian(1.0)], 1e-5, adjacency="beside")  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="unit"):
        account([Gaussian(0.0)], 1e-5, unit="city")  # type: ignore[arg-type]
    with pytest.raises(LichenError, match="too few"):
        delta_for(1)
    with pytest.raises(LichenError, match="ε"):
        sigma_for(0.0, 1e-5, 1)


def test_says_what_to_install_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(LichenError, match=r"lichen\[privacy\]"):
        epsilon([Gaussian(1.0)], 1e-5)


@counts
def test_epsilon_and_noise_are_those_that_the_library_gives_itself() -> None:
    import dp_accounting
    from dp_accounting import pld

    rate, delta, steps = 0.3, 5.8e-4, 12

    def event(sigma: float, count: int) -> dp_accounting.DpEvent:
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        return dp_accounting.SelfComposedDpEvent(sampled, count)

    for count in (1, 5, steps):
        theirs = pld.PLDAccountant().compose(event(5.36, count)).get_epsilon(delta)
        assert epsilon([Sampled(Gaussian(5.36, steps=count), rate=rate)], delta) == pytest.approx(theirs, abs=1e-6)
    theirs = dp_accounting.calibrate_dp_mechanism(
        pld.PLDAccountant,
        lambda sigma: event(sigma, steps),
        1.0,
        delta,
        dp_accounting.ExplicitBracketInterval(2.0, 4.0),
        tol=1e-7,
    )
    assert sigma_for(1.0, delta, steps, rate=rate, within=2e-7) == pytest.approx(theirs, rel=1e-6)
    assert sigma_for(1.0, delta, steps, rate=rate, within=2e-7, sensitivity=0.5) == pytest.approx(theirs / 2, rel=1e-6)
