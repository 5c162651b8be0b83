"""Shares are those of a second implementation, which computes in GF(2^128) bit by bit."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from Crypto.Protocol.SecretSharing import Shamir

from lichen.core.masks.shares import combine, commitment, deal

HALVES = (slice(0, 16), slice(16, 32))
FIELD = 1 << 128 | 1 << 7 | 1 << 2 | 1 << 1 | 1


def product(a: int, b: int) -> int:
    out = 0
    for bit in range(128):
        if b >> bit & 1:
            out ^= a << bit
    for bit in range(255, 127, -1):
        if out >> bit & 1:
            out ^= FIELD << bit - 128
    return out


def inverse(a: int) -> int:
    """a^(2^128 - 2)."""
    out, power = 1, a
    for _ in range(127):
        power = product(power, power)
        out = product(out, power)
    return out


def interpolated(points: Mapping[int, bytes], x: int) -> bytes:
    """The two polynomials through the points, at x."""
    found = [0, 0]
    for own, share in points.items():
        weight = 1
        for other in points:
            if other != own:
                weight = product(weight, product(x ^ other, inverse(own ^ other)))
        for half in (0, 1):
            found[half] ^= product(int.from_bytes(share[16 * half : 16 * half + 16], "big"), weight)
    return b"".join(value.to_bytes(16, "big") for value in found)


@pytest.mark.parametrize(("threshold", "holders"), [(2, 3), (3, 4), (8, 12)])
def test_any_threshold_of_shares_opens_the_secret_and_gives_all_others(threshold: int, holders: int) -> None:
    draw = random.Random(holders)
    secret, key = draw.randbytes(32), draw.randbytes(32)
    shares = deal(secret, threshold, range(1, holders + 1), key)
    some = {x: shares[x] for x in draw.sample(range(1, holders + 1), threshold)}
    assert combine(some) == interpolated(some, 0) == secret
    assert b"".join(Shamir.combine([(x, s[half]) for x, s in some.items()]) for half in HALVES) == secret
    others = [x for x in shares if x not in some][:2]
    assert [interpolated(some, x) for x in others] == [shares[x] for x in others]


def test_a_wrong_share_and_one_too_few_open_something_else() -> None:
    shares = deal(b"s" * 32, 3, range(1, 6), bytes(32))
    assert combine({1: shares[1], 2: shares[2]}) != b"s" * 32
    assert combine({1: shares[1], 2: shares[2], 3: shares[4]}) != b"s" * 32


def test_the_shares_of_the_librarys_own_split_are_combined_as_well() -> None:
    low, high = (dict(Shamir.split(3, 5, half * 16)) for half in (b"a", b"b"))
    assert combine({x: low[x] + high[x] for x in (5, 2, 3)}) == b"a" * 16 + b"b" * 16


def test_equal_keys_deal_equal_shares_and_a_share_is_the_same_whoever_else_gets_one() -> None:
    shares = deal(b"s" * 32, 3, range(1, 6), bytes(32))
    assert deal(b"s" * 32, 3, (5, 2), bytes(32)) == {x: shares[x] for x in (5, 2)}
    other = deal(b"s" * 32, 3, range(1, 6), b"k" * 32)
    assert all(shares[x] != other[x] for x in shares)


def test_a_commitment_is_to_everything_it_names() -> None:
    said = (b"context", 1, 2, 1, b"s" * 32, b"t" * 16)
    others = (b"contexts", 2, 1, 2, b"S" * 32, b"T" * 16)
    changed = [commitment(*said[:i], others[i], *said[i + 1 :]) for i in range(6)]  # type: ignore[arg-type]
    assert len({commitment(*said), *changed}) == 7
