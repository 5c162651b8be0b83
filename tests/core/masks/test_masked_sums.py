"""A masked sum is the sum, whoever drops out; below the thresholds there is none."""

from __future__ import annotations

import numpy as np
import pytest

from lichen.core.errors import LichenError
from lichen.core.masks.graph import degree, neighbours
from lichen.core.masks.party import ADVERT, OPENING, SEALED, Party
from support.masked_talk import Talk, numbers, plain


def test_all_get_through_and_the_sum_is_exact() -> None:
    units = numbers([7, 3, 11, 0, 5], 33)
    talk = Talk(units, k=4, threshold=3)
    assert np.array_equal(talk.total(), plain(units, list(units), 33))
    assert talk.closing.survivors == (0, 3, 5, 7, 11)
    assert talk.closing.liars == talk.refusals == {}


@pytest.mark.parametrize("stage", range(4))
def test_two_of_seven_drop_out_at_a_stage(stage: int) -> None:
    units = numbers(range(7), 5)
    talk = Talk(units, k=4, threshold=3, stages={2: stage, 6: stage})
    left = [client for client in units if stage == 3 or client not in (2, 6)]
    assert np.array_equal(talk.total(), plain(units, left, 5))
    assert talk.closing.survivors == tuple(left)


def test_too_few_survivors_are_an_abort() -> None:
    talk = Talk(numbers(range(6), 3), k=5, threshold=4, stages={0: 2, 1: 2, 2: 2})
    with pytest.raises(LichenError) as caught:
        talk.total()
    assert caught.value.where == caught.value.reason == "masks"


def test_equal_entropy_says_equal_bytes_and_another_context_other_ones() -> None:
    def said(context: bytes) -> list[bytes]:
        out: list[bytes] = []

        def change(stage: str, client: int, message: np.ndarray) -> np.ndarray:
            if stage in ("advertise", "share", "commit", "mask", "open"):
                out.append(message.tobytes())
            return message

        Talk(numbers(range(4), 9), k=3, threshold=3, context=context, change=change, stages={2: 2}).total()
        return out

    first, again, other = said(b"a"), said(b"a"), said(b"b")
    assert first == again
    assert len(first) == len(other) > 12
    assert not set(first) & set(other)


def test_rows_have_the_sizes_that_are_declared() -> None:
    party = Party(0, b"", bytes(32), k=2, threshold=2)
    others = [Party(client, b"", bytes([client]) * 32, k=2, threshold=2) for client in (1, 2)]
    sealed, commitments = party.share([1, 2], np.stack([other.advertise() for other in others]))
    assert party.advertise().shape == (ADVERT,)
    assert sealed.shape == (2, SEALED)
    assert commitments.shape == (3, 2, 32)
    boxes = []
    for other, third in (others, others[::-1]):
        ids = [0, third._client]
        boxes.append(other.share(ids, np.stack([party.advertise(), third.advertise()]))[0][0])
    party.receive(np.stack(boxes), np.ones(2, dtype=np.bool_))
    party.mask(np.zeros(1, dtype=np.int64))
    assert party.open(np.ones(2, dtype=np.bool_)).shape == (3, OPENING)


@pytest.mark.parametrize(("count", "k", "each"), [(10, 4, 4), (10, 5, 5), (9, 5, 4), (9, 8, 8), (6, 30, 5), (2, 1, 1)])
def test_the_graph_is_symmetric_and_regular(count: int, k: int, each: int) -> None:
    clients = list(range(3, 3 + 2 * count, 2))
    around = neighbours(clients, k, b"seed")
    assert {len(others) for others in around.values()} == {each}
    assert all(client in around[other] and client != other for client in clients for other in around[client])
    assert all(list(others) == sorted(set(others)) for others in around.values())
    assert around == neighbours(clients[::-1], k, b"seed")
    if each < count - 1:
        assert around != neighbours(clients, k, b"other seed")


def test_few_clients_mask_with_all_others() -> None:
    assert [degree(n, dropped=0.1, colluding=0.1) for n in (3, 4, 5, 8)] == [(2, 2), (3, 3), (4, 3), (7, 5)]
