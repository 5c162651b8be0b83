"""What is refused in masked sums: no client opens both secrets of one, twice, or below the threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lichen.core.errors import LichenError
from lichen.core.masks.closing import Closing
from lichen.core.masks.party import ADVERT, OPENING, SEALED, Party

K, T, N = 4, 3, 6
CONTEXT = b"run round attempt"
Array = NDArray[Any]


def fresh(client: int, **more: Any) -> Party:
    return Party(client, CONTEXT, bytes([client]) * 32, k=K, threshold=T, **more)


def parties() -> dict[int, Party]:
    return {client: fresh(client) for client in range(K + 1)}


def asked(through: dict[int, Party]) -> tuple[dict[int, tuple[list[int], Array]], dict[int, Array]]:
    """What each is asked to share, and the boxes that are for each."""
    adverts = {client: party.advertise() for client, party in through.items()}
    shares = {c: ([o for o in through if o != c], np.stack([adverts[o] for o in through if o != c])) for c in through}
    sealed = {client: party.share(*shares[client])[0] for client, party in through.items()}
    return shares, {c: np.stack([sealed[o][c - (o < c)] for o in through if o != c]) for c in through}


ALL = np.ones(K, dtype=np.bool_)


def but(*gone: int) -> NDArray[np.bool_]:
    return np.array([i not in gone for i in range(K)])


def ready(present: NDArray[np.bool_] = ALL) -> Party:
    """Client 0, which has masked its numbers."""
    through = parties()
    boxes = asked(through)[1][0]
    boxes[~present] = 0
    through[0].receive(boxes, present)
    through[0].mask(np.arange(N))
    return through[0]


def test_of_each_client_one_secret_is_opened_and_the_answer_stays() -> None:
    party = ready(but(3))
    opened = party.open(but(1, 3))
    assert opened[:, 0].tolist() == [1, 2, 1, 0, 1]
    assert not opened[3].any()
    assert np.array_equal(party.open(but(1, 3)), opened)


@pytest.mark.parametrize("other", [but(3), but(0, 3), but(2, 3)])
def test_no_second_set_is_opened(other: NDArray[np.bool_]) -> None:
    party = ready(but(3))
    party.open(but(1, 3))
    with pytest.raises(LichenError, match="twice"):
        party.open(other)


def test_nothing_is_opened_below_the_threshold_or_for_one_who_was_not_there() -> None:
    with pytest.raises(LichenError, match="open a secret"):
        ready().open(but(0, 1, 2))
    with pytest.raises(LichenError, match="no mask with one"):
        ready(but(3)).open(but(1))


def test_no_two_sets_find_a_threshold_of_holders_for_both_secrets_of_a_client() -> None:
    for k in range(2, 30):
        for threshold in range(1, k + 3):
            try:
                Party(0, b"", bytes(32), k=k, threshold=threshold)
            except LichenError:
                assert 2 * threshold <= k + 1 or threshold > k + 1
            else:
                assert 2 * threshold > k + 1


def test_other_numbers_are_not_masked() -> None:
    party = ready()
    again = party.mask(np.arange(N))
    assert np.array_equal(party.mask(np.arange(N)), again)
    for other in (np.arange(N) + 1, np.arange(N + 1)):
        with pytest.raises(LichenError, match="twice"):
            party.mask(other)


def test_the_order_of_the_stages_is_kept() -> None:
    party = fresh(0)
    for early in (
        lambda: party.receive(np.zeros((K, SEALED), dtype=np.uint8), ALL),
        lambda: party.mask(np.arange(N)),
        lambda: party.open(ALL),
    ):
        with pytest.raises(LichenError, match="before"):
            early()


def _low_order(ids: list[int], adverts: Array) -> None:
    adverts[1, :32] = 0


def _low_order_box(ids: list[int], adverts: Array) -> None:
    adverts[1, 32:64] = 0


def _reflected(ids: list[int], adverts: Array) -> None:
    adverts[1] = fresh(0).advertise()


def _itself(ids: list[int], adverts: Array) -> None:
    ids[1] = 0


def _twice(ids: list[int], adverts: Array) -> None:
    ids[1] = ids[2]


def _few(ids: list[int], adverts: Array) -> None:
    ids[1:] = [-1] * (K - 1)


def _nobody(ids: list[int], adverts: Array) -> None:
    ids[1] = -2


@pytest.mark.parametrize("wrong", [_low_order, _low_order_box, _reflected, _itself, _twice, _few, _nobody])
def test_neighbours_with_whom_nothing_would_be_hidden_are_refused(wrong: Callable[[list[int], Array], None]) -> None:
    through = parties()
    ids, adverts = asked(through)[0][0]
    ids, adverts = list(ids), adverts.copy()
    wrong(ids, adverts)
    party = fresh(0)
    with pytest.raises(LichenError) as caught:
        party.share(ids, adverts)
    assert caught.value.where == "masks"


def test_other_neighbours_get_no_shares_and_the_same_get_the_same() -> None:
    ids, adverts = asked(parties())[0][0]
    party = fresh(0)
    first = party.share(ids, adverts)
    assert all(np.array_equal(a, b) for a, b in zip(party.share(ids, adverts), first, strict=True))
    with pytest.raises(LichenError, match="twice"):
        party.share(ids[::-1], adverts[::-1].copy())


def test_a_client_that_begins_again_with_other_neighbours_seals_under_other_nonces_and_deals_other_shares() -> None:
    ids, adverts = asked(parties())[0][0]
    one, other = fresh(0).share(ids, adverts), fresh(0).share(ids[::-1], adverts[::-1].copy())
    assert all(one[0][i, :12].tobytes() != other[0][K - 1 - i, :12].tobytes() for i in range(K))
    assert not (one[1] == other[1]).all(axis=-1).any()


def test_boxes_that_do_not_open_too_few_of_them_and_those_of_nobody_are_refused() -> None:
    def given(change: Callable[[Array], None], present: NDArray[np.bool_]) -> Callable[[], None]:
        through = parties()
        boxes = asked(through)[1][0]
        change(boxes)
        return lambda: through[0].receive(boxes, present)

    def flip(boxes: Array) -> None:
        boxes[2, 40] ^= 1

    def swap(boxes: Array) -> None:
        boxes[[0, 1]] = boxes[[1, 0]]

    def clear(boxes: Array) -> None:
        boxes[1:] = 0

    for change, present, what in (
        (flip, ALL, "client 3 sent client 0 a box that does not open"),
        (swap, ALL, "client 1 sent client 0 a box that does not open"),
        (clear, but(1, 2, 3), "2 holders"),
        (lambda boxes: None, but(2), "of nobody who got through"),
    ):
        with pytest.raises(LichenError, match=what):
            given(change, present)()


@pytest.mark.parametrize(("entropy", "k", "threshold"), [(31, 4, 3), (32, 4, 2), (32, 5, 3), (32, 4, 6)])
def test_what_hides_nothing_is_no_party(entropy: int, k: int, threshold: int) -> None:
    with pytest.raises(LichenError):
        Party(0, CONTEXT, bytes(entropy), k=k, threshold=threshold)


def server(through: dict[int, Party]) -> Closing:
    """The server, when shares have gone through it."""
    closing = Closing(CONTEXT, k=K, threshold=T)
    ids, adverts = closing.keys(list(through), np.stack([party.advertise() for party in through.values()]))
    said = [party.share(ids[i].tolist(), adverts[i]) for i, party in enumerate(through.values())]
    closing.shares(list(through), *(np.stack([both[i] for both in said]) for i in (0, 1)))
    return closing


def test_masked_numbers_come_once_of_one_length_and_from_those_who_shared() -> None:
    closing = server(parties())
    row = np.zeros((1, N), dtype=np.int64)
    closing.masked([0], row)
    for clients, rows in (([0], row), ([9], row), ([1, 1], np.tile(row, (2, 1))), ([1], row[:, 1:]), ([1, 2], row)):
        with pytest.raises(LichenError):
            closing.masked(clients, rows)
    closing.masked([1, 2], np.tile(row, (2, 1)))
    closing.alive([0, 1, 2])
    assert closing.survivors == (0, 1, 2)
    with pytest.raises(LichenError, match="keep the order"):
        closing.masked([3], row)


def test_few_clients_have_no_sum() -> None:
    closing = Closing(CONTEXT, k=1, threshold=2)
    with pytest.raises(LichenError, match="3 at least"):
        closing.keys([0, 1], np.zeros((2, ADVERT), dtype=np.uint8))
    closing = server(parties())
    closing.masked([0, 1], np.zeros((2, N), dtype=np.int64))
    with pytest.raises(LichenError, match="3 at least"):
        closing.alive([0, 1])


def test_shares_come_from_survivors_alone() -> None:
    closing = server(parties())
    closing.masked([0, 1, 2], np.zeros((3, N), dtype=np.int64))
    closing.alive([0, 1, 2])
    with pytest.raises(LichenError, match="client 3"):
        closing.total([0, 1, 3], np.zeros((3, K + 1, OPENING), dtype=np.uint8))
