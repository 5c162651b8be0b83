"""Privacy accounting: (ε, δ) of Gaussian mechanisms, with the unit that is protected.

A number ε means nothing without its neighbours: two data sets that differ by one row, or by one client
with all its rows, that was added or removed, or replaced. So an :class:`Event` carries the L2 distance
between the sums of two neighbours, and the result is a :class:`Statement` that names them.

Nothing is accounted for by hand: privacy loss distributions (``"pld"``, tight) and Rényi divergences
(``"rdp"``, looser, what many papers print) are those of the library dp-accounting, an extra that is
imported when it is first needed. Two of its conventions are not passed on. Its two accountants read a plain
Gaussian under replacement differently (one doubles the sensitivity, one does not), so it is only ever asked for the
pair N(0, σ²), N(Δ, σ²), with Δ the distance that the event states. And sampling under replacement needs
more than that distance, so it is refused.

References:
    Cynthia Dwork, Frank McSherry, Kobbi Nissim and Adam Smith. "Calibrating Noise to Sensitivity in
    Private Data Analysis." TCC 2006. https://doi.org/10.1007/11681878_14
    Ilya Mironov. "Rényi Differential Privacy." CSF 2017. https://arxiv.org/abs/1702.07476
    Borja Balle and Yu-Xiang Wang. "Improving the Gaussian Mechanism for Differential Privacy: Analytical
    Calibration and Optimal Denoising." ICML 2018. https://arxiv.org/abs/1805.06530
    Vadym Doroshenko, Badih Ghazi, Pritish Kamath, Ravi Kumar and Pasin Manurangsi. "Connect the Dots:
    Tighter Discrete Approximations of Privacy Loss Distributions." PoPETs 2022.
    https://arxiv.org/abs/2207.04380
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, Literal, final

from lichen.core.errors import LichenError

__all__ = ["Accountant", "Adjacency", "Event", "Gaussian", "Sampled", "Statement", "Unit", "delta_for"]
__all__ += ["account", "epsilon", "sigma_for"]

Accountant = Literal["pld", "rdp"]
Adjacency = Literal["add-or-remove", "replace"]
Unit = Literal["row", "client"]

_WORDS = {"add-or-remove": "adding or removing", "replace": "replacing"}
_INTERVAL = 1e-4
"""Of privacy losses, to which the library rounds them; its own default."""

# Between whole numbers the best order of a plain Gaussian is missed by up to 1e-2 in ε.
_ORDERS = tuple(1 + i / 50 for i in range(1, 1600)) + tuple(range(33, 513))


@final
@dataclass(frozen=True, slots=True)
class Gaussian:
    """A sum with normal noise, released ``steps`` times.

    Args:
        sigma: Standard deviation of the noise, in the unit of the sum; 0 for none.
        sensitivity: L2 distance by which the sums of two neighbours may differ.
        steps: Releases.

    Raises:
        LichenError: if a number is out of range.
    """

    sigma: float
    _: KW_ONLY
    sensitivity: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < math.inf:
            raise LichenError(f"noise of {self.sigma}", where="privacy.sigma", fix="use a finite number >= 0")
        if not 0 < self.sensitivity < math.inf:
            raise LichenError(
                f"{self.sensitivity} bounds nothing", where="event.sensitivity", fix="use a finite number > 0"
            )
        if self.steps < 0:
            raise LichenError(f"{self.steps} steps", where="event.steps", fix="use 0 or more")


@final
@dataclass(frozen=True, slots=True)
class Sampled:
    """A :class:`Gaussian` of a sample in which every unit is with chance ``rate``, by its own coin, each step anew.

    Who was in the sample must stay secret. Sampling clients amplifies the privacy of clients and of their rows.

    Args:
        event: The mechanism; its sensitivity is for adding or removing one unit.
        rate: In (0, 1].

    Raises:
        LichenError: if the rate is out of range.
    """

    event: Gaussian
    _: KW_ONLY
    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise LichenError(f"{self.rate} is out of range", where="event.rate", fix="use 0 < rate <= 1")


Event = Gaussian | Sampled


@final
@dataclass(frozen=True, slots=True)
class Statement:
    """(ε, δ)-differential privacy, of what.

    Args:
        epsilon: ε ≥ 0; infinite where no noise was added.
        delta: δ in (0, 1).
        adjacency: How two neighbours differ.
        unit: By what they differ.
        accountant: Whose numbers these are.

    >>> print(Statement(1.00446, delta=3.6e-8, adjacency="add-or-remove", unit="row", accountant="pld"))
    (1.005, 3.6e-08)-differential privacy for adding or removing one row (PLD accountant)
    """

    epsilon: float
    _: KW_ONLY
    delta: float
    adjacency: Adjacency
    unit: Unit
    accountant: Accountant

    def __str__(self) -> str:
        what = f"for {_WORDS[self.adjacency]} one {self.unit}"
        if math.isinf(self.epsilon):
            return f"no differential privacy {what}: ε is infinite, for no noise was added"
        # Rounded up: what is printed must hold.
        up = math.ceil(self.epsilon * 1000) / 1000
        return f"({up:.3f}, {self.delta:.2g})-differential privacy {what} ({self.accountant.upper()} accountant)"


def delta_for(count: int) -> float:
    """δ = 1 / (N ln N), a usual choice for N units.

    Raises:
        LichenError: for fewer than 2.

    >>> f"{delta_for(75316):.3g}"
    '1.18e-06'
    """
    if count < 2:
        raise LichenError(f"{count} units are too few", where="privacy.delta", fix="name δ yourself")
    return 1 / (count * math.log(count))


def epsilon(
    events: Sequence[Event], delta: float, *, adjacency: Adjacency = "add-or-remove", accountant: Accountant = "pld"
) -> float:
    """The least ε at ``delta`` that the accountant can vouch for, of all events together.

    Infinite where an event has no noise, 0 where nothing was released.

    Raises:
        LichenError: if δ is no chance, a word is unknown, an event is sampled under replacement, or
            noise is to be accounted for and dp-accounting is not installed.
    """
    _check(delta, adjacency, accountant)
    released = [event for event in events if _plain(event).steps]
    for event in released:
        if isinstance(event, Sampled) and event.rate < 1 and adjacency == "replace":
            raise LichenError(
                "sampling is only accounted for where a unit is added or removed",
                where="statement.adjacency",
                fix="use add-or-remove, or leave the sampling out",
            )
    if not released:
        return 0.0
    if any(_plain(event).sigma == 0 for event in released):
        return math.inf
    return _composed(tuple(released), delta, accountant)


@lru_cache(maxsize=256)
def _composed(released: tuple[Event, ...], delta: float, accountant: Accountant, interval: float = _INTERVAL) -> float:
    """ε of events with noise; a run asks for the same ones when it is planned, begun and told of."""
    sampled = any(isinstance(e, Sampled) and e.rate < 1 for e in released)
    events_of, made = _library(accountant, sampled=sampled, interval=interval)
    for event in released:
        plain = _plain(event)
        composed = events_of.GaussianDpEvent(plain.sigma / plain.sensitivity)
        if isinstance(event, Sampled) and event.rate < 1:
            composed = events_of.PoissonSampledDpEvent(event.rate, composed)
        made.compose(composed, plain.steps)
    return float(made.get_epsilon(delta))


def account(
    events: Sequence[Event],
    delta: float,
    *,
    unit: Unit,
    adjacency: Adjacency = "add-or-remove",
    accountant: Accountant = "pld",
) -> Statement:
    """The :class:`Statement` of these events; raises as :func:`epsilon`."""
    if unit not in ("row", "client"):
        raise LichenError(f"unknown unit {unit!r}", where="privacy.unit", fix="use row or client")
    value = epsilon(events, delta, adjacency=adjacency, accountant=accountant)
    return Statement(value, delta=delta, adjacency=adjacency, unit=unit, accountant=accountant)


def sigma_for(
    target: float,
    delta: float,
    steps: int,
    *,
    sensitivity: float = 1.0,
    rate: float = 1.0,
    accountant: Accountant = "pld",
    within: float = 1e-3,
) -> float:
    """The least noise, to a relative ``within``, whose ε over ``steps`` releases is at most ``target``.

    Found by the secant method between two bounds; the answer always keeps the promise.

    Args:
        target: ε > 0.
        delta: δ.
        steps: Releases, at least 1.
        sensitivity: As in :class:`Gaussian`.
        rate: Of Poisson sampling; 1 for none.
        accountant: Who vouches.
        within: Relative width at which the search ends.

    Raises:
        LichenError: as :func:`epsilon`, and if the target is out of reach.
    """
    if not 0 < target < math.inf or steps < 1 or not 0 < within < 1:
        raise LichenError(
            f"ε = {target} over {steps} steps, to within {within}",
            where="privacy.epsilon",
            fix="use a finite ε > 0, 1 step or more, and a width between 0 and 1",
        )

    def spent(multiplier: float, interval: float = _INTERVAL) -> float:
        plain = Gaussian(multiplier, steps=steps)
        return _composed((plain if rate == 1 else Sampled(plain, rate=rate),), delta, accountant, interval)

    tried, slope = _unsampled(target, delta, steps) * (1.0 if rate == 1 else max(math.sqrt(rate), 0.05)), -1.0
    if rate < 1 and accountant == "pld":  # a coarse accountant is fast, and close
        tried, slope = _searched(lambda multiplier: spent(multiplier, 20 * _INTERVAL), target, tried, slope, 1e-4)
    return _searched(spent, target, tried, slope, within)[0] * sensitivity


def _searched(
    spent: Callable[[float], float], target: float, tried: float, slope: float, within: float
) -> tuple[float, float]:
    """``(the least noise that spends at most the target, the slope there)``, in logarithms; from a first guess of both.

    Raises:
        LichenError: if no noise does.
    """
    low, high = 0.0, math.inf  # what spends too much, and what keeps the promise
    before: tuple[float, float] | None = None
    while high == math.inf or high - low > within * high:
        value = spent(tried)
        low, high = (low, tried) if value <= target else (tried, high)
        if high < 1e-3:
            break
        if low > 1e7:
            raise LichenError(f"no noise gives ε = {target}", where="privacy.epsilon", fix="use a larger ε or δ")
        # ε falls nearly along a line; a step a little beyond where it meets the target finds both sides.
        x, y = math.log(tried), math.log(max(value, 1e-12) / target)
        if before is not None and x != before[0]:
            slope = min((y - before[1]) / (x - before[0]), -0.1)
        before = x, y
        beyond = within / 3 if value > target else -within / 3
        tried = math.exp(x - y / slope + beyond)
        if not low < tried < high:
            tried = low * 2 if high == math.inf else high / 2 if low == 0 else math.sqrt(low * high)
    return high, slope


def _unsampled(target: float, delta: float, steps: int) -> float:
    """The exact noise of ``steps`` plain Gaussians of sensitivity 1."""
    _library("pld", sampled=False)
    from dp_accounting import gaussian_mechanism

    return float(gaussian_mechanism.get_sigma_gaussian(target, delta)) * math.sqrt(steps)


def _plain(event: Event) -> Gaussian:
    return event.event if isinstance(event, Sampled) else event


def _check(delta: float, adjacency: str, accountant: str) -> None:
    if not 0 < delta < 1:
        raise LichenError(f"{delta} is no chance", where="privacy.delta", fix="use 0 < delta < 1, well below 1/units")
    if adjacency not in _WORDS:
        raise LichenError(f"unknown {adjacency!r}", where="statement.adjacency", fix="use add-or-remove or replace")
    if accountant not in ("pld", "rdp"):
        raise LichenError(f"unknown accountant {accountant!r}", where="statement.accountant", fix="use pld or rdp")


def _library(accountant: Accountant, *, sampled: bool, interval: float = _INTERVAL) -> tuple[Any, Any]:
    """``(its events, a fresh accountant)``; for each event the neighbours are N(0, σ²) and N(Δ, σ²)."""
    try:
        from dp_accounting import dp_event, pld, rdp
    except ImportError:
        raise LichenError(
            "dp-accounting is not installed, and privacy is not accounted for without it",
            where="privacy",
            fix="pip install 'lichen[privacy]', or add no noise",
        ) from None
    if accountant == "pld":
        return dp_event, pld.PLDAccountant(value_discretization_interval=interval)
    # Fractional orders of a sampled Gaussian are slow and do not always converge.
    return dp_event, rdp.RdpAccountant(list(range(2, 257)) if sampled else list(_ORDERS))
