"""Whatever becomes of a message on its way: an exact sum of those who are left, or an abort that says why."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from lichen.core.errors import LichenError
from lichen.core.masks import closing, pairs, shares
from support.masked_talk import Talk, ended, numbers, plain

CLIENTS, N = 5, 3
STAGES = ("advertise", "share", "commit", "open", "adverts", "boxes", "present", "alive")
"""What clients say, and what the server passes on to one of them."""


class Kit:
    """A client's long-term key, and all others' public ones."""

    def __init__(self, client: int, public: dict[int, Ed25519PublicKey]) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(bytes([client + 1]) * 32)
        self.public = public
        public[client] = self.key.public_key()

    def sign(self, data: bytes) -> bytes:
        return self.key.sign(data)

    def verify(self, client: int, data: bytes, signature: bytes) -> bool:
        try:
            self.public[client].verify(signature, data)
        except InvalidSignature:
            return False
        return True


def talk_of(change: Callable[[str, int, NDArray[Any]], NDArray[Any]], seed: int, *, signed: bool) -> Talk:
    public: dict[int, Ed25519PublicKey] = {}
    kits = {client: Kit(client, public) for client in range(CLIENTS)} if signed else None
    return Talk(
        numbers(range(CLIENTS), N, seed=seed),
        k=CLIENTS - 1,
        threshold=3,
        context=b"talk %d" % seed,
        stages={1: 3} if seed % 3 == 0 else {2: 2} if seed % 3 == 1 else None,
        identities=kits,
        change=change,
    )


def heard(seed: int, *, signed: bool) -> dict[tuple[str, int], NDArray[Any]]:
    """All messages of a talk in which nothing was changed."""
    messages: dict[tuple[str, int], NDArray[Any]] = {}

    def change(stage: str, client: int, message: NDArray[Any]) -> NDArray[Any]:
        messages[stage, client] = message.copy()
        return message

    talk_of(change, seed, signed=signed).total()
    return messages


def mutated(
    draw: random.Random, stage: str, client: int, now: dict[tuple[str, int], Any], before: dict[tuple[str, int], Any]
) -> NDArray[Any]:
    """A message in place of the one that a client sends, or is sent, at a stage."""
    message = now[stage, client].copy()
    flat, kind = message.reshape(-1), draw.choice(("flip", "flip", "swap", "rows", "replay", "zeros", "noise", "cut"))
    others = [other for at, other in now if at == stage and other != client]
    if kind == "swap":
        return now[stage, draw.choice(others)].copy()
    if kind == "replay":
        return before.get((stage, client), np.zeros_like(message)).copy()
    if kind == "zeros":
        return np.zeros_like(message)
    if kind == "rows":
        return message[::-1].copy()
    if kind == "cut":
        return message[:-1]
    if kind == "noise":
        bits = np.frombuffer(draw.randbytes(flat.size), dtype=np.uint8)
        flat[:] = bits & 1 if message.dtype == np.bool_ else bits
        return message
    at = draw.randrange(flat.size)
    flat[at] = not flat[at] if message.dtype == np.bool_ else flat[at] ^ (1 << draw.randrange(8))
    return message


@pytest.fixture
def _remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand talks agree on few keys, and cut and open few secrets: each is computed once."""
    monkeypatch.setattr(pairs, "agree", functools.cache(pairs.agree))
    deal = functools.cache(shares.deal)
    monkeypatch.setattr(shares, "deal", lambda secret, threshold, xs, key: deal(secret, threshold, tuple(xs), key))
    combine = functools.cache(lambda items: shares.combine(dict(items)))
    monkeypatch.setattr(closing, "combine", lambda given: combine(tuple(given.items())))


@pytest.mark.usefixtures("_remembered")
@pytest.mark.parametrize("signed", [False, True])
def test_no_change_of_a_message_makes_another_sum(signed: bool) -> None:
    draw = random.Random(signed)
    messages = {seed: heard(seed, signed=signed) for seed in range(4)}
    exact = aborted = named = 0
    for _ in range(500):
        seed = draw.randrange(1, 4)
        stage = draw.choice(STAGES)
        client = draw.choice([client for at, client in messages[seed] if at == stage])
        changed = mutated(draw, stage, client, messages[seed], messages[seed - 1])

        def change(at: str, who: int, message: NDArray[Any]) -> NDArray[Any]:
            return changed if (at, who) == (stage, client) else message  # noqa: B023

        talk = talk_of(change, seed, signed=signed)
        total, error = ended(talk)
        if total is None:
            assert error is not None
            assert error.reason == "masks"
            aborted += 1
        else:
            assert len(talk.closing.survivors) >= 3
            assert np.array_equal(total, plain(talk.units, talk.closing.survivors, N)), (stage, client)
            exact += 1
        named += bool(talk.closing.liars or talk.refusals)
    print(f"\n{exact} sums exact, {aborted} aborts; in {named} talks somebody was refused by name")
    assert min(exact, aborted, named) > 20


def test_masked_numbers_that_were_changed_are_no_more_than_other_numbers() -> None:
    changed = np.array([5, -1, 2**62], dtype=np.int64)
    talk = talk_of(
        lambda stage, client, message: message + changed if (stage, client) == ("mask", 3) else message, 2, signed=False
    )
    assert np.array_equal(talk.total(), plain(talk.units, range(CLIENTS), N) + changed)


@pytest.mark.parametrize("stage", ["advertise", "adverts"])
def test_a_changed_advert_is_refused_by_its_signature(stage: str) -> None:
    def change(at: str, who: int, message: NDArray[Any]) -> NDArray[Any]:
        if (at, who) == (stage, 0):
            message = message.copy()
            message.reshape(-1)[7] ^= 1
        return message

    talk = talk_of(change, 2, signed=True)
    if stage == "advertise":
        with pytest.raises(LichenError):
            talk.total()
        assert all("client 0 has a bad signature" in error.what for error in list(talk.refusals.values())[1:])
    else:
        assert np.array_equal(talk.total(), plain(talk.units, range(1, CLIENTS), N))
        assert "bad signature" in talk.refusals[0].what
