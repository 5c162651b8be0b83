"""A client's half of masked sums: four stages after which the server knows a sum and none of its terms.

==========  ==============================================  =======================================================
stage       the client says                                 the client is answered
==========  ==============================================  =======================================================
advertise   two public keys, a commitment                   its neighbours' adverts
share       sealed shares of its two secrets                what its neighbours sealed for it, and who got through
mask        its numbers under all masks                     whose masked numbers arrived
open        a share of one secret of each who got through   -
==========  ==============================================  =======================================================

The numbers lie under a mask of the client's own, from a seed, and one for each neighbour, from what their two keys have
in common: the one with the lesser number adds it, the other takes it away. The server takes away the masks of those who
got through by their seeds, and what remains of those who did not by their private keys. Of one client only one of the
two is ever opened, for with both the server had its numbers.

A box that opens says that two neighbours know each other's adverts alike, so that the mask between them goes away. One
that does not ends the client's part and names the neighbour. Shares in a box that opens which are not what the dealer
has committed to harm the dealer alone: they stay unopened.

Everything follows from ``entropy``, so that a client that begins again says the same bytes. Whoever calls takes a new
context where anything may differ from what was said before: other numbers, neighbours or survivors.

References:
    James Bell, Kallista Bonawitz, Adrià Gascón, Tancrède Lepoint and Mariana Raykova. "Secure Single-Server Aggregation
    with (Poly)Logarithmic Overhead." CCS 2020. https://eprint.iacr.org/2020/704
    Keith Bonawitz et al. "Practical Secure Aggregation for Privacy-Preserving Machine Learning." CCS 2017.
    https://eprint.iacr.org/2017/281

Legend: k neighbours, N numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

from lichen.core.masks.keys import derive, public_of
from lichen.core.masks.layout import (
    ADVERT,
    COMMITMENT,
    KEY,
    NONCE,
    OPENING,
    SALT,
    SEALED,
    SECRET,
    SEED,
    SIGNATURE,
    digest,
    refused,
    shaped,
    signed_part,
)
from lichen.core.masks.pairs import Pair, pair
from lichen.core.masks.shares import deal_both
from lichen.core.masks.streams import add_stream

__all__ = ["ADVERT", "OPENING", "SEALED", "Identity", "Party"]


class Identity(Protocol):
    """A client's long-term key, and those of the others."""

    def sign(self, data: bytes) -> bytes:
        """A signature that others know as the client's, 64 bytes (Ed25519)."""
        ...

    def verify(self, client: int, data: bytes, signature: bytes) -> bool:
        """Whether a client has signed the data."""
        ...


@final
class Party:
    """One client in one talk.

    Args:
        client: Its number.
        context: Names the run, the round and the attempt; the same for all in it, and used once.
        entropy: At least 32 secret bytes, from which all of its secrets follow.
        k: Neighbours at most.
        threshold: Shares that open a secret; more than half of the ``k + 1`` holders.
        identity: Signs and verifies adverts; None where nobody could speak for another, as in a simulation.

    Raises:
        LichenError: if the entropy is short, or the threshold no more than half of the holders, or more than all.
    """

    def __init__(
        self, client: int, context: bytes, entropy: bytes, *, k: int, threshold: int, identity: Identity | None = None
    ) -> None:
        if len(entropy) < SECRET:
            raise refused(f"{len(entropy)} bytes of entropy", f"give {SECRET}")
        if not k + 1 < 2 * threshold <= 2 * (k + 1):
            raise refused(
                f"{threshold} of {k + 1} holders open a secret", "let it be more than half of them, at most all"
            )
        self._client, self._context, self._k, self._threshold, self._identity = client, context, k, threshold, identity
        self._secret = derive(entropy, "party", context, client)
        self._seed = derive(self._secret, "seed")
        self._private = (derive(self._secret, "mask key"), derive(self._secret, "box key"))
        self._advert = self._advertised()
        self._answered: dict[str, bytes] = {}  # by stage, a digest of what the client was asked
        self._pairs: list[Pair | None] = []
        self._shared: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
        self._own = b""
        self._parts: list[tuple[bytes | None, bytes | None]] = []
        self._present: NDArray[np.bool_] | None = None

    def advertise(self) -> NDArray[np.uint8]:
        """The client's public keys, commitment and signature: ``(ADVERT,)``."""
        return np.frombuffer(self._advert, dtype=np.uint8).copy()

    def share(self, ids: Sequence[int], adverts: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Deal both secrets to the neighbours.

        Args:
            ids: ``(k,)`` the neighbours' numbers; -1 where there is none.
            adverts: ``(k, ADVERT)`` theirs.

        Returns:
            ``(k, SEALED)`` boxes, and ``(k + 1, 2, 32)`` commitments to each holder's two shares, the last one's its
            own; zeros where there is no neighbour.

        Raises:
            LichenError: if a signature is bad, an advert is the client's own or has keys of small order, a number is
                the client's own or comes twice, the holders are fewer than the threshold, or this was asked before
                with other adverts.
        """
        ids = [int(client) for client in ids]
        shaped("adverts", adverts, (self._k, ADVERT), np.uint8)
        request = self._same("share", repr(ids).encode() + adverts.tobytes())
        if self._shared is not None:
            return self._shared[0].copy(), self._shared[1].copy()
        known = [client for client in ids if client != -1]
        if len(ids) != self._k or min(known, default=0) < 0 or len({*known, self._client}) <= len(known):
            raise refused(f"client {self._client} was given neighbours {ids}", f"name {self._k} others, each once")
        self._enough(len(known) + 1, "holders of its shares")
        rows = [adverts[i].tobytes() for i in range(self._k)]
        self._pairs = [None if client == -1 else self._pair(client, rows[i]) for i, client in enumerate(ids)]
        holders = {i + 1: client for i, client in enumerate([*ids, self._client]) if client != -1}
        secrets, key = {SEED: self._seed, KEY: self._private[0]}, derive(self._secret, "dealing", request)
        sealed = np.zeros((self._k, SEALED), dtype=np.uint8)
        commitments = np.zeros((self._k + 1, 2, COMMITMENT), dtype=np.uint8)
        dealt = deal_both(self._context, self._client, holders, self._threshold, secrets, key)
        for x, (body, promised) in dealt.items():
            commitments[x - 1] = np.frombuffer(promised, dtype=np.uint8).reshape(2, COMMITMENT)
            if (to := self._pairs[x - 1] if x <= self._k else None) is not None:
                box = to.seal(body, promised, derive(key, "nonce", x)[:NONCE])
                sealed[x - 1] = np.frombuffer(box, dtype=np.uint8)
            else:
                self._own = body[: SECRET + SALT]
        self._shared, self._answered["share"] = (sealed, commitments), request
        return sealed.copy(), commitments.copy()

    def receive(self, sealed: NDArray[np.uint8], present: NDArray[np.bool_]) -> None:
        """Take what the neighbours have sealed for the client.

        Args:
            sealed: ``(k, SEALED)`` by neighbour.
            present: ``(k,)`` which of them got through the stage.

        Raises:
            LichenError: if the holders who got through are fewer than the threshold, a box of one of them does not
                open, there is one of somebody else, or this was asked before with other boxes.
        """
        shaped("sealed", sealed, (self._k, SEALED), np.uint8)
        shaped("present", present, (self._k,), np.bool_)
        self._after("share", "receive")
        request = self._same("receive", present.tobytes() + sealed.tobytes())
        if any(present[i] > (of is not None) or sealed[i].any() > present[i] for i, of in enumerate(self._pairs)):
            raise refused(f"client {self._client} is sent a box of nobody who got through", "repeat the round")
        self._enough(int(present.sum()) + 1, "holders of its shares who got through")
        parts: list[tuple[bytes | None, bytes | None]] = [(None, None)] * self._k
        for i, of in enumerate(self._pairs):
            if of is not None and present[i]:
                box = sealed[i].tobytes()
                body = of.unseal(box)
                if body is None:
                    raise refused(f"client {of.other} sent client {self._client} a box that does not open")
                parts[i] = of.parts(body, box)
        self._parts, self._present, self._answered["receive"] = parts, present.copy(), request

    def mask(self, units_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers under the client's own mask and those between it and its neighbours, modulo 2^64.

        Args:
            units_N: int64 ``(N,)``.

        Raises:
            LichenError: if other numbers were masked before.
        """
        shaped("numbers", units_N, (units_N.size,), np.int64)
        self._after("receive", "mask")
        self._answered["mask"] = self._same("mask", np.ascontiguousarray(units_N))
        assert self._present is not None
        masked_N = units_N.copy()
        add_stream(masked_N, derive(self._seed, "self mask"), 1)
        for i, to in enumerate(self._pairs):
            if to is not None and self._present[i]:
                add_stream(masked_N, to.mask, 1 if self._client < to.other else -1)
        return masked_N

    def open(self, alive: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """A share of one secret of each who got through: of the seed where its numbers arrived, of the key where not.

        Args:
            alive: ``(k,)`` the neighbours whose masked numbers arrived.

        Returns:
            ``(k + 1, OPENING)`` by dealer, the last its own; zeros where there is none, or none that can be opened.

        Raises:
            LichenError: if the holders whose numbers arrived are fewer than the threshold, one of them did not get
                through before, or this was asked before of others.
        """
        shaped("alive", alive, (self._k,), np.bool_)
        self._after("mask", "open")
        self._enough(int(alive.sum()) + 1, "holders of its shares whose numbers arrived")
        assert self._present is not None
        if bool((alive & ~self._present).any()):
            raise refused(f"client {self._client} has no mask with one whose numbers arrived", "ask what was asked")
        self._answered["open"] = self._same("open", alive.tobytes())
        opened = np.zeros((self._k + 1, OPENING), dtype=np.uint8)
        for i in range(self._k):
            kind = SEED if alive[i] else KEY
            if self._present[i] and (part := self._parts[i][kind - 1]) is not None:
                opened[i] = np.frombuffer(bytes([kind]) + part, dtype=np.uint8)
        opened[self._k] = np.frombuffer(bytes([SEED]) + self._own, dtype=np.uint8)
        return opened

    def _advertised(self) -> bytes:
        promised = digest("seed", self._context, self._client, self._seed)
        advert = b"".join(public_of(private) for private in self._private) + promised
        if self._identity is None:
            return advert + bytes(SIGNATURE)
        return advert + self._identity.sign(signed_part(self._context, self._client, advert))

    def _pair(self, client: int, advert: bytes) -> Pair:
        signature = advert[-SIGNATURE:]
        if self._identity is not None and not self._identity.verify(
            client, signed_part(self._context, client, advert), signature
        ):
            raise refused(f"the advert of client {client} has a bad signature")
        return pair(self._context, self._client, self._advert, self._private, client, advert)

    def _same(self, stage: str, request: Any) -> bytes:
        """A digest of what is asked, if nothing else was asked at this stage before."""
        found = hashlib.sha256(request).digest()
        if self._answered.get(stage, found) != found:
            raise refused(f"client {self._client} was asked to {stage} twice, and differently", "take a new context")
        return found

    def _after(self, before: str, stage: str) -> None:
        if before not in self._answered:
            raise refused(f"client {self._client} was asked to {stage} before {before}", "keep the order")

    def _enough(self, count: int, whom: str) -> None:
        if count < self._threshold:
            what = f"client {self._client} has {count} {whom}, and {self._threshold} open a secret"
            raise refused(what, "repeat the round with more clients")
