"""A budget says never less than what has left, is changed by nobody unseen, and does not reach past its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lichen.core.errors import LichenError
from lichen.core.secret.budget import Budget, begun_with

TERMS = {"sigma": 1.5, "epsilon": None}


def budget(path: Path, **more: Any) -> Budget:
    return Budget(path / "budget.jsonl", terms=TERMS, **more)


def test_an_open_round_goes_on_and_a_closed_one_is_charged_again(tmp_path: Path) -> None:
    one = budget(tmp_path)
    assert begun_with(one.path) is None
    assert one.charge(0) == 0
    assert budget(tmp_path).charge(0) == 0  # a kill before the sum was closed
    one.close(0, 0)
    again = budget(tmp_path)
    assert again.charges == 1
    assert again.charge(0) == 1  # a kill after it
    again.close(0, 1)
    assert again.charge(1) == 0
    last = budget(tmp_path)
    assert last.charges == 3
    assert begun_with(last.path) == TERMS
    with pytest.raises(LichenError, match="not open"):
        last.close(0, 1)
    with pytest.raises(LichenError, match="does not say what it has cost"):
        last.charge(2)


def test_it_refuses_the_round_that_would_pass_epsilon(tmp_path: Path) -> None:
    one = budget(tmp_path, limit=2)
    for number in (0, 0):
        one.close(number, one.charge(number))
    assert one.exhausted
    assert not one.pays_for(1)
    before = one.path.read_bytes()
    with pytest.raises(LichenError, match="round 2 would pass"):
        one.charge(1)
    assert one.path.read_bytes() == before
    open_still = budget(tmp_path, limit=3)
    open_still.charge(1)
    assert open_still.exhausted
    assert open_still.pays_for(1)


def test_a_line_cut_short_was_never_charged_and_any_other_change_is_seen(tmp_path: Path) -> None:
    one = budget(tmp_path)
    one.close(0, one.charge(0))
    one.charge(1)
    whole = one.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    one.path.write_bytes(whole[:-5])
    assert budget(tmp_path).charges == 1
    assert one.path.read_bytes() == b"".join(lines[:-1])
    for damaged in (
        b"",
        b"".join(lines[1:]),
        b"".join([*lines[:1], *lines[2:]]),
        b"".join([lines[0], lines[2], lines[1], lines[3]]),
        whole.replace(b'"round": 1', b'"round": 2'),
        whole.replace(b"1.5", b"9.5"),
    ):
        one.path.write_bytes(damaged)
        with pytest.raises(LichenError, match=r"damaged|empty"):
            budget(tmp_path)
    one.path.write_bytes(whole)
    with pytest.raises(LichenError, match="another sigma"):
        Budget(one.path, terms={**TERMS, "sigma": 0.1})
