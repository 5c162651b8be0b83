"""Drift detectors alarm where river's do and where plain definitions say, and go on from what was dumped."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.server.drift.adwin import Adwin
from lichen.server.drift.detector import Detector, watch
from lichen.server.drift.page_hinkley import PageHinkley
from lichen.server.drift.standardised import DETECTORS, Standardised, detector_of

RIVER = json.loads((Path(__file__).parent / "river_alarms.json").read_text(encoding="utf-8"))
LIKE_RIVER: dict[str, Detector] = {
    "page-hinkley up": PageHinkley(),
    "page-hinkley down": PageHinkley(direction="down"),
    "page-hinkley both": PageHinkley(direction="both"),
    "adwin": Adwin(direction="both"),
    "adwin every number": Adwin(0.01, every=1, direction="both"),
}
EVERY = {**LIKE_RIVER, **DETECTORS, "short": Standardised(PageHinkley(threshold=4.0), beginning=5)}


def normal(count: int, mean: float, seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(mean, 1) for _ in range(count)]


@pytest.mark.parametrize("name", LIKE_RIVER)
@pytest.mark.parametrize("series", RIVER)
def test_alarms_come_where_rivers_do(series: str, name: str) -> None:
    assert watch(LIKE_RIVER[name], RIVER[series]["values"])[1] == RIVER[series][name]


def test_river_was_asked_for_something() -> None:
    for name in LIKE_RIVER:
        assert any(RIVER[series][name] for series in RIVER)


def plain_page_hinkley(values: list[float], delta: float, threshold: float, alpha: float) -> int | None:
    """The first alarm, each sum written out anew."""
    for t in range(30, len(values) + 1):
        off = [x - math.fsum(values[: i + 1]) / (i + 1) - delta for i, x in enumerate(values[:t])]
        m = [math.fsum(alpha ** (i - j) * off[j] for j in range(i + 1)) for i in range(t)]
        if m[-1] - min(m) > threshold:
            return t - 1
    return None


@pytest.mark.parametrize("seed", range(3))
def test_page_hinkley_is_its_definition(seed: int) -> None:
    values = normal(40, 0.0, seed) + normal(30, 1.0, seed + 9)
    plain = plain_page_hinkley(values, 0.02, 6.0, 0.99)
    assert plain is not None
    assert watch(PageHinkley(0.02, threshold=6.0, alpha=0.99), values)[1][0] == plain


def plain_adwin(values: list[float], delta: float, part: int) -> int | None:
    """The first place at which some cut of all numbers so far shows a change."""
    for t in range(11, len(values) + 1):
        window = values[:t]
        mean = math.fsum(window) / t
        variance = math.fsum((x - mean) ** 2 for x in window) / t
        bits = math.log(2 * math.log(t) / delta)
        for n_0 in range(part, t - part + 1):
            per_m = 1 / (n_0 - part + 1) + 1 / (t - n_0 - part + 1)
            apart = abs(math.fsum(window[:n_0]) / n_0 - math.fsum(window[n_0:]) / (t - n_0))
            if apart > math.sqrt(2 * per_m * variance * bits) + 2 / 3 * per_m * bits:
                return t - 1
    return None


@pytest.mark.parametrize("seed", range(3))
def test_adwin_without_merged_buckets_is_its_definition(seed: int) -> None:
    values = normal(60, 0.0, seed) + normal(60, 2.0, seed + 9)
    plain = plain_adwin(values, 0.002, 5)
    assert plain is not None
    assert watch(Adwin(every=1, buckets=200, direction="both"), values)[1][0] == plain


@given(name=st.sampled_from(sorted(EVERY)), cut=st.integers(0, 160), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_dumped_state_goes_on_to_the_same_bits(name: str, cut: int, seed: int) -> None:
    detector, values = EVERY[name], normal(80, 0.0, seed) + normal(80, 3.0, seed + 1)
    whole, alarms = watch(detector, values)
    before, first = watch(detector, values[:cut])
    dumped = detector.dump(before)
    assert dumped.shape == (detector.size,)
    after, rest = watch(detector, values[cut:], detector.load(dumped))
    assert first + [cut + position for position in rest] == alarms
    assert torch.equal(detector.dump(after), detector.dump(whole))


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_of_any_scale_alarm_at_the_same_row_and_only_where_they_rise(name: Any) -> None:
    steps = normal(300, 0.0, 1) + normal(300, 1.0, 2)
    alarms = watch(detector_of(name), steps)[1]
    assert len(alarms) == 1
    assert 300 < alarms[0] < 450
    assert watch(detector_of(name), [1024.0 * x + 4096.0 for x in steps])[1] == alarms
    assert watch(detector_of(name), [-x for x in steps])[1] == []


def test_a_constant_beginning_has_no_scale_and_what_is_no_number_is_left_out() -> None:
    detector = Standardised(PageHinkley(threshold=10.0, minimum=1), beginning=5)
    assert watch(detector, [2.0] * 50)[1] == []
    alarms = watch(detector, [2.0] * 20 + [2.5] * 20)[1]
    assert alarms
    assert alarms[0] < 30
    odd = [2.0] * 20 + [math.nan, math.inf] + [2.5] * 20
    assert watch(detector, odd)[1][0] == alarms[0] + 2


def test_bad_numbers_and_states_are_refused() -> None:
    for make in (
        lambda: PageHinkley(-1.0),
        lambda: PageHinkley(alpha=0.0),
        lambda: Adwin(1.0),
        lambda: Adwin(buckets=1),
        lambda: Standardised(Adwin(), beginning=1),
    ):
        with pytest.raises(LichenError, match="out of range"):
            make()
    for detector in EVERY.values():
        with pytest.raises(LichenError, match="are no state of"):
            detector.load(torch.zeros(detector.size + 1, dtype=torch.float64))
        with pytest.raises(LichenError, match="are no state of"):
            detector.load(torch.full((detector.size,), math.nan, dtype=torch.float64))
    with pytest.raises(LichenError, match="no detector 'sum'"):
        detector_of("sum")  # type: ignore[arg-type]
