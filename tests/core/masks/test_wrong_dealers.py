"""Who lies with shares is named: who opens what it was not dealt, and who dealt what does not open its secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lichen.core.errors import LichenError
from lichen.core.masks import party
from lichen.core.masks.shares import deal_both
from support.masked_talk import Talk, numbers, plain

N = 4


def talk_of(**more: Any) -> Talk:
    return Talk(numbers(range(6), N), k=5, threshold=4, **more)


@pytest.mark.parametrize("row", range(6))
def test_a_holder_that_opens_a_wrong_share_is_named_and_not_needed(row: int) -> None:
    def change(stage: str, client: int, message: NDArray[Any]) -> NDArray[Any]:
        if (stage, client) == ("open", 3):
            message = message.copy()
            message[row, 5] ^= 4
        return message

    talk = talk_of(change=change, stages={1: 2})
    assert np.array_equal(talk.total(), plain(talk.units, [0, 2, 3, 4, 5], N))
    assert list(talk.closing.liars) == [3]


def test_a_holder_that_opens_the_other_secret_is_named() -> None:
    def change(stage: str, client: int, message: NDArray[Any]) -> NDArray[Any]:
        if (stage, client) == ("open", 3):
            message = message.copy()
            message[0, 0] = 3 - message[0, 0]
        return message

    talk = talk_of(change=change)
    assert np.array_equal(talk.total(), plain(talk.units, range(6), N))
    assert "other secret of client 0" in talk.closing.liars[3]


def test_too_many_wrong_shares_are_an_abort() -> None:
    def change(stage: str, client: int, message: NDArray[Any]) -> NDArray[Any]:
        if stage == "open" and client < 3:
            message = message.copy()
            message[4, 9] ^= 1
        return message

    talk = talk_of(change=change)
    with pytest.raises(LichenError, match="3 good shares"):
        talk.total()
    assert set(talk.closing.liars) == {0, 1, 2}


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("honest_hashes", [True, False])
def test_a_dealer_of_wrong_shares_is_found_out_where_they_are_needed(
    kind: int, honest_hashes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(
        context: bytes,
        dealer: int,
        holders: Mapping[int, int],
        threshold: int,
        secrets: Mapping[int, bytes],
        key: bytes,
    ) -> dict[int, tuple[bytes, bytes]]:
        true = deal_both(context, dealer, holders, threshold, secrets, key)
        if dealer != 2:
            return true
        wrong = deal_both(context, dealer, holders, threshold, {**secrets, kind: b"w" * 32}, key)
        return {x: (wrong[x][0], true[x][1] if honest_hashes else wrong[x][1]) for x in true}

    monkeypatch.setattr(party, "deal_both", lie)
    for dropped in (False, True):
        talk = talk_of(stages={2: 2} if dropped else None)
        if dropped == (kind == 2):
            with pytest.raises(LichenError, match="client 2"):
                talk.total()
            # Of its seed it opens a share itself, which is not the one that it has committed to.
            assert list(talk.closing.liars) == ([2] if kind == 1 or not honest_hashes else [])
        else:
            left = [client for client in range(6) if client != 2 or not dropped]
            assert np.array_equal(talk.total(), plain(talk.units, left, N))
            assert talk.closing.liars == {}


def test_boxes_without_their_commitments_leave_their_dealer_out() -> None:
    def change(stage: str, client: int, message: NDArray[Any]) -> NDArray[Any]:
        return message ^ 1 if (stage, client) == ("commit", 4) else message

    talk = talk_of(change=change)
    assert np.array_equal(talk.total(), plain(talk.units, [0, 1, 2, 3, 5], N))
    assert list(talk.closing.liars) == [4]
