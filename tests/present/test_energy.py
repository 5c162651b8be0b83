"""Joules: counters that turn over, zones inside zones, machines that do not say."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lichen.present.measured.energy import Counter, Meter, counters, nvml_counter, rapl_counters


def zone(folder: Path, path: str, name: str, joules: float, turn: float = 1000.0) -> Path:
    home = folder / path
    home.mkdir(parents=True)
    (home / "name").write_text(f"{name}\n")
    (home / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (home / "max_energy_range_uj").write_text(f"{round(turn * 1e6)}\n")
    return home


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two packages with cores inside, memory beside, one package shown twice, and the whole board."""
    (tmp_path / "intel-rapl").mkdir()
    for path, name, joules in (
        ("intel-rapl:0", "package-0", 100.0),
        ("intel-rapl:0:0", "core", 60.0),
        ("intel-rapl:0:1", "dram", 10.0),
        ("intel-rapl:1", "package-1", 200.0),
        ("intel-rapl:1:1", "dram", 20.0),
        ("intel-rapl:2", "psys", 999.0),
        ("intel-rapl-mmio:0", "package-0", 100.0),
    ):
        zone(tmp_path, path, name, joules)
    return tmp_path


def add(folder: Path, path: str, joules: float) -> None:
    file = folder / path / "energy_uj"
    file.write_text(str(int(file.read_text()) + round(joules * 1e6)))


def test_every_joule_counts_once(machine: Path) -> None:
    found = rapl_counters(machine)
    assert sorted(counter.name for counter in found) == [
        "dram of intel-rapl:0",
        "dram of intel-rapl:1",
        "package-0",
        "package-1",
    ]
    with Meter(found) as meter:
        assert meter.joules() == 0
        for path, joules in (
            ("intel-rapl:0", 5),
            ("intel-rapl:0:0", 3),
            ("intel-rapl-mmio:0", 5),
            ("intel-rapl:1:1", 2),
        ):
            add(machine, path, joules)
        assert meter.joules() == pytest.approx(7)


def test_a_counter_that_turns_over(machine: Path) -> None:
    with Meter(rapl_counters(machine)) as meter:
        add(machine, "intel-rapl:1", 790)
        assert meter.joules() == pytest.approx(790)
        (machine / "intel-rapl:1" / "energy_uj").write_text("15000000")
        assert meter.joules() == pytest.approx(790 + 25)


@given(st.lists(st.floats(0, 99.0), max_size=20), st.floats(0, 99.0))
def test_turns_lose_nothing(spent: list[float], start: float) -> None:
    total = [start]
    with Meter([Counter("package-0", read=lambda: total[0] % 100, turn=100.0)]) as meter:
        for joules in spent:
            total[0] += joules
            meter.joules()
        assert meter.joules() == pytest.approx(sum(spent), abs=1e-6)


def test_a_machine_that_does_not_say(tmp_path: Path, machine: Path) -> None:
    assert rapl_counters(tmp_path / "none") == ()
    (machine / "intel-rapl:0" / "energy_uj").unlink()
    assert {c.name for c in rapl_counters(machine) if "package" in c.name} == {"package-0", "package-1"}
    (machine / "intel-rapl-mmio:0" / "energy_uj").write_text("what?")
    assert {c.name for c in rapl_counters(machine) if "package" in c.name} == {"package-1"}
    with Meter(()) as meter:
        assert meter.joules() is None


def test_a_counter_that_goes_away_takes_the_sum_with_it(machine: Path) -> None:
    with Meter(rapl_counters(machine)) as meter:
        assert meter.joules() == 0
        (machine / "intel-rapl:1" / "energy_uj").unlink()
        assert meter.joules() is None
        (machine / "intel-rapl:1" / "energy_uj").write_text("300000000")
        assert meter.joules() is None


def test_sessions_of_one_run_add_up(machine: Path) -> None:
    before: float | None = 0.0
    for joules, total in ((5, 5), (7, 12)):
        with Meter(rapl_counters(machine), before=before) as meter:
            add(machine, "intel-rapl:0", joules)
            before = meter.joules()
            assert before == pytest.approx(total)
        add(machine, "intel-rapl:0", 11)  # between sessions, somebody else's
    for session in ((), rapl_counters(machine)):
        with Meter(session, before=before) as meter:
            before = meter.joules()
            assert before is None, "a session that was not counted leaves no whole sum"


def test_an_accelerator_is_counted_or_nothing_is(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml_counter(0) is None
    assert counters("cuda:1", folder=machine) == ()
    assert counters("mps", folder=machine) == ()
    assert len(counters("cpu", folder=machine)) == 4
    total = [7_000.0]
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: total[0] * (handle + 1),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = counters("cuda:1", folder=machine)
    assert [c.name for c in found][-1] == "accelerator 1"
    assert len(found) == 5
    with Meter(found) as meter:
        total[0] += 4_000
        assert meter.joules() == pytest.approx(8)
