"""The server's half of masked sums: passes on what clients say to one another, adds, and takes the masks off the sum.

Nothing that comes is believed. A share that is opened is held against what its dealer committed to, the seed or the key
that shares open against what the dealer has advertised. So a sum is exact, or there is none: whoever sent what does not
fit is named, and where it can be done without, it is.

Legend: C clients of a call, k neighbours, N numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from lichen.core.errors import LichenError
from lichen.core.masks.graph import neighbours
from lichen.core.masks.keys import derive
from lichen.core.masks.layout import (
    ADVERT,
    COMMITMENT,
    KEY,
    OPENING,
    PUBLIC,
    SEALED,
    SEED,
    digest,
    refused,
    shaped,
)
from lichen.core.masks.opening import advertised, good_shares
from lichen.core.masks.pairs import mask_key
from lichen.core.masks.shares import combine
from lichen.core.masks.streams import add_stream

__all__ = ["Closing"]


@final
class Closing:
    """One talk, as the server leads it: its methods in their order, each once; ``masked`` as often as messages come.

    Args:
        context: Names the run, the round and the attempt, as the clients know it.
        k: Neighbours at most.
        threshold: Shares that open a secret.
        least: Clients that a sum has at least.

    Attributes:
        liars: By client, what it said that does not fit.
        survivors: Whose numbers are in the sum, in ascending order; known from ``alive`` on.
    """

    def __init__(self, context: bytes, *, k: int, threshold: int, least: int = 3) -> None:
        self._context, self._k, self._threshold, self._least = context, k, threshold, least
        self.liars: dict[int, str] = {}
        self.survivors: tuple[int, ...] = ()
        self._adverts: dict[int, bytes] = {}
        self._around: dict[int, tuple[int, ...]] = {}
        self._commitments: dict[int, NDArray[np.uint8]] = {}  # of those who got through the second stage
        self._arrived: set[int] = set()
        self._total_N: NDArray[np.int64] | None = None
        self._stage = "keys"

    def keys(
        self, clients: Sequence[int], adverts_CA: NDArray[np.uint8]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Choose each client's neighbours, and pass their adverts on.

        Args:
            clients: Who advertised, each once.
            adverts_CA: ``(C, ADVERT)``.

        Returns:
            ``(C, k)`` the neighbours' numbers, -1 where there is none, and ``(C, k, ADVERT)`` their adverts.

        Raises:
            LichenError: if a secret would have too few holders, or there are fewer clients than a sum needs.
        """
        self._at("keys", "shares")
        shaped("adverts", adverts_CA, (len(clients), ADVERT), np.uint8)
        self._each_once(clients)
        self._many(len(clients), "advertised")
        if (holders := min(self._k, len(clients) - 1) + 1) < self._threshold:
            raise refused(f"{holders} holders a secret, and {self._threshold} open one", "invite more clients")
        self._adverts = {client: row.tobytes() for client, row in zip(clients, adverts_CA, strict=True)}
        every = b"".join(digest(client, self._adverts[client]) for client in sorted(clients))
        self._around = neighbours(sorted(clients), self._k, digest("graph", self._context, every))
        ids_Ck = np.full((len(clients), self._k), -1, dtype=np.int64)
        adverts_CkA = np.zeros((len(clients), self._k, ADVERT), dtype=np.uint8)
        for row, client in enumerate(clients):
            for i, other in enumerate(self._around[client]):
                ids_Ck[row, i] = other
                adverts_CkA[row, i] = np.frombuffer(self._adverts[other], dtype=np.uint8)
        return ids_Ck, adverts_CkA

    def shares(
        self, clients: Sequence[int], sealed_CkS: NDArray[np.uint8], commitments_CkX: NDArray[np.uint8]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Pass boxes on to whom they are for.

        Args:
            clients: Who shared, each once.
            sealed_CkS: ``(C, k, SEALED)`` by sealer.
            commitments_CkX: ``(C, k + 1, 2, 32)``.

        Returns:
            ``(C, k, SEALED)`` by who can open them, and ``(C, k)`` which neighbours got through. One whose boxes hold
            other commitments did not, and is among the liars.

        Raises:
            LichenError: if a client is not one of those who advertised, or too few are left.
        """
        self._at("shares", "masked")
        shaped("sealed", sealed_CkS, (len(clients), self._k, SEALED), np.uint8)
        shaped("commitments", commitments_CkX, (len(clients), self._k + 1, 2, COMMITMENT), np.uint8)
        self._each_once(clients, self._adverts, "advertised")
        boxes: dict[int, NDArray[np.uint8]] = {}
        for row, client in enumerate(clients):
            there = len(self._around[client])
            clear = sealed_CkS[row, :there, -2 * COMMITMENT :].reshape(there, 2, COMMITMENT)
            if np.array_equal(clear, commitments_CkX[row, :there]):
                boxes[client], self._commitments[client] = sealed_CkS[row], commitments_CkX[row].copy()
            else:
                self.liars[client] = "its boxes do not hold its commitments"
        self._many(len(boxes), "shared")
        passed_CkS, present_Ck = np.zeros_like(sealed_CkS), np.zeros((len(clients), self._k), dtype=np.bool_)
        for row, client in enumerate(clients):
            for i, other in enumerate(self._around[client] if client in boxes else ()):
                if other in boxes:
                    passed_CkS[row, i] = boxes[other][self._around[other].index(client)]
                    present_Ck[row, i] = True
        return passed_CkS, present_Ck

    def masked(self, clients: Sequence[int], masked_CN: NDArray[np.int64]) -> None:
        """Add masked numbers, modulo 2^64; may be called for some clients at a time.

        Args:
            clients: Whose they are.
            masked_CN: int64 ``(C, N)``.

        Raises:
            LichenError: if a client did not get through before or comes twice, or the numbers are others in count;
                then nothing was added.
        """
        self._at("masked", "masked")
        count = masked_CN.shape[-1] if self._total_N is None else len(self._total_N)
        shaped("masked numbers", masked_CN, (len(clients), count), np.int64)
        self._each_once(clients, self._commitments, "shared")
        if twice := self._arrived & set(clients):
            raise refused(f"client {min(twice)} sent masked numbers twice")
        if self._total_N is None:
            self._total_N = np.zeros(count, dtype=np.int64)
        for row_N in masked_CN:
            self._total_N += row_N
        self._arrived |= set(clients)

    def alive(self, clients: Sequence[int]) -> NDArray[np.bool_]:
        """Say whose masked numbers arrived; no more are added from here on.

        Args:
            clients: Who is asked to open, of those whose numbers arrived.

        Returns:
            ``(C, k)``: by client, which of its neighbours.

        Raises:
            LichenError: if too few arrived.
        """
        self._at("masked", "total")
        self._each_once(clients, self._arrived, "sent masked numbers")
        self._many(len(self._arrived), "sent masked numbers")
        self.survivors = tuple(sorted(self._arrived))
        alive_Ck = np.zeros((len(clients), self._k), dtype=np.bool_)
        for row, client in enumerate(clients):
            for i, other in enumerate(self._around[client]):
                alive_Ck[row, i] = other in self._arrived
        return alive_Ck

    def total(self, clients: Sequence[int], opened_CkO: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The sum of the numbers of all survivors, modulo 2^64.

        Args:
            clients: Who opened, of the survivors.
            opened_CkO: ``(C, k + 1, OPENING)`` by holder and dealer.

        Returns:
            int64 ``(N,)``.

        Raises:
            LichenError: if a secret has too few good shares, or is not what its dealer advertised.
        """
        self._at("total", "done")
        shaped("opened shares", opened_CkO, (len(clients), self._k + 1, OPENING), np.uint8)
        self._each_once(clients, self._arrived, "sent masked numbers")
        assert self._total_N is not None
        opened = dict(zip(clients, opened_CkO, strict=True))
        good, liars = good_shares(self._context, self._around, self._commitments, self._arrived, opened)
        self.liars |= liars
        secrets = {dealer: self._secret(dealer, good[dealer]) for dealer in sorted(good)}
        total_N = self._total_N
        for dealer, secret in secrets.items():
            if dealer in self._arrived:
                add_stream(total_N, derive(secret, "self mask"), -1)
                continue
            for other in self._around[dealer]:
                if other in self._arrived:
                    key = mask_key(self._context, dealer, secret, other, self._adverts[other][:PUBLIC])
                    if key is None:
                        raise self._named(other, "its key is one with which nothing is secret")
                    add_stream(total_N, key, 1 if dealer < other else -1)
        self._total_N = None
        return total_N

    def _secret(self, dealer: int, shares: dict[int, bytes]) -> bytes:
        """What the shares of a dealer open, if it is what the dealer has advertised."""
        kind = SEED if dealer in self._arrived else KEY
        if len(shares) < self._threshold:
            what = f"{len(shares)} good shares of a secret of client {dealer}, and {self._threshold} open it"
            raise refused(what, "repeat the round")
        secret = combine(dict(sorted(shares.items())[: self._threshold]))
        if not advertised(self._context, dealer, kind, secret, self._adverts[dealer]):
            raise self._named(dealer, "its shares open something else than it has advertised")
        return secret

    def _named(self, client: int, what: str) -> LichenError:
        self.liars[client] = what
        return refused(f"client {client}: {what}")

    def _at(self, stage: str, then: str) -> None:
        if self._stage != stage:
            raise refused(f"{stage} was asked for at the stage of {self._stage}", "keep the order")
        self._stage = then

    def _many(self, count: int, what: str) -> None:
        if count < self._least:
            raise refused(f"{count} clients {what}, and a sum has {self._least} at least", "invite more clients")

    @staticmethod
    def _each_once(clients: Sequence[int], among: Collection[int] | None = None, what: str = "") -> None:
        if len(set(clients)) < len(clients) or min(clients, default=0) < 0:
            raise refused(f"clients {list(clients)}", "name each once, from 0")
        if among is not None and (others := set(clients) - set(among)):
            raise refused(f"client {min(others)} is not one of those who {what}")
