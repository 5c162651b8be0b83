"""A clock that is a day off is named where a person can set it, and changes nothing else."""

from __future__ import annotations

import datetime
import socket
import ssl
import time
from pathlib import Path

import pytest

from lichen.federation import reach
from lichen.federation.kits.settle import open_kit

pytest.importorskip("nvflare")

DAY = datetime.timedelta(days=1)


def read(kit: Path, monkeypatch: pytest.MonkeyPatch, *, off: datetime.timedelta) -> str:
    """What a site's person reads whose clock is off."""
    now = datetime.datetime.now(datetime.UTC) + off
    monkeypatch.setattr(reach, "_now", lambda: now)
    found = reach.obstacle(open_kit(kit))
    assert found is not None
    return str(found.error)


def test_a_clock_a_day_behind_is_named_with_the_dates_of_a_young_kit(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = read(federation / "kits" / "a", monkeypatch, off=-DAY)
    first, today = datetime.datetime.now(datetime.UTC), datetime.datetime.now(datetime.UTC) - DAY
    assert f"holds from {first:%Y}" in said
    assert f"and this machine says {today:%Y-%m-%d}\n  fix: set the clock" in said
    assert "nobody listens there" in read(federation / "kits" / "a", monkeypatch, off=DAY)


@pytest.mark.parametrize(("code", "words"), [(9, "not in force"), (10, "not in force"), (19, "not of the authority")])
def test_a_servers_certificate_that_is_not_in_force_is_no_other_authoritys(
    federation: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def connect(*_: object) -> None:
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_code = code
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    assert words in read(federation / "kits" / "a", monkeypatch, off=datetime.timedelta())


def test_who_is_there_does_not_depend_on_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    from lichen.federation import component

    before = component._now()
    assert abs(before - time.time()) < 60
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= component._now() - before < 60
