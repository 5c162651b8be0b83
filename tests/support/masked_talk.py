"""Talks of masked sums from end to end, with clients that drop out, and with messages that somebody has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lichen.core.errors import LichenError
from lichen.core.masks.closing import Closing
from lichen.core.masks.party import ADVERT, OPENING, SEALED, Identity, Party

Change = Callable[[str, int, NDArray[Any]], NDArray[Any]]
"""Stage, client and the message that it sends, or is sent: what arrives in its place."""


def numbers(clients: Sequence[int], count: int, seed: int = 0) -> dict[int, NDArray[np.int64]]:
    """Uniform int64 of each client, so that sums wrap."""
    draw = np.random.default_rng(seed)
    return {client: draw.integers(-(2**63), 2**63 - 1, count, dtype=np.int64) for client in clients}


def plain(units: Mapping[int, NDArray[np.int64]], clients: Sequence[int], count: int) -> NDArray[np.int64]:
    """The sum modulo 2^64."""
    total = np.zeros(count, dtype=np.int64)
    for client in clients:
        total += units[client]
    return total


class Talk:
    """All parties and the server of one talk; ``total`` runs it.

    ``stages`` says after how many stages each client drops out, 4: never. ``refusals`` holds what parties refused.
    """

    def __init__(
        self,
        units: Mapping[int, NDArray[np.int64]],
        *,
        k: int,
        threshold: int,
        context: bytes = b"run 1 round 1 attempt 0",
        stages: Mapping[int, int] | None = None,
        identities: Mapping[int, Identity] | None = None,
        change: Change = lambda stage, client, message: message,
        entropy: Callable[[int], bytes] = lambda client: client.to_bytes(32, "big"),
    ) -> None:
        self.units, self.change, self.stages, self.k = units, change, dict(stages or {}), k
        self.parties = {
            client: Party(
                client,
                context,
                entropy(client),
                k=k,
                threshold=threshold,
                identity=None if identities is None else identities[client],
            )
            for client in units
        }
        self.closing = Closing(context, k=k, threshold=threshold)
        self.refusals: dict[int, LichenError] = {}

    def _stage(self, stage: str, number: int, asked: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        out = {}
        for client, what in asked.items():
            if self.stages.get(client, 4) <= number:
                continue
            try:
                out[client] = self._say(stage, client, what)
            except LichenError as error:
                self.refusals[client] = error
        return out

    def _say(self, stage: str, client: int, what: tuple[Any, ...]) -> Any:
        party = self.parties[client]
        if stage == "advertise":
            return self._sent(stage, client, party.advertise())
        if stage == "share":
            sealed, commitments = party.share(what[0], self.change("adverts", client, what[1]))
            return self._sent(stage, client, sealed), self._sent("commit", client, commitments)
        if stage == "mask":
            party.receive(self.change("boxes", client, what[0]), self.change("present", client, what[1]))
            return self._sent(stage, client, party.mask(self.units[client]))
        return self._sent(stage, client, party.open(self.change("alive", client, what[0])))

    def _sent(self, stage: str, client: int, message: NDArray[Any]) -> NDArray[Any]:
        changed = self.change(stage, client, message)
        if changed.shape != message.shape:
            raise LichenError("is not of the shape that was declared", where=stage, reason="masks")  # as admission does
        return changed

    def total(self) -> NDArray[np.int64]:
        """Run all four stages.

        Raises:
            LichenError: as the server does.
        """
        closing = self.closing
        said = self._stage("advertise", 0, dict.fromkeys(self.parties, ()))
        ids, adverts = closing.keys(list(said), stacked(said.values(), ADVERT))
        said = self._stage("share", 1, {client: (ids[i], adverts[i]) for i, client in enumerate(said)})
        boxes, commitments = ([both[i] for both in said.values()] for i in (0, 1))
        sealed, present = closing.shares(
            list(said), stacked(boxes, self.k, SEALED), stacked(commitments, self.k + 1, 2, 32)
        )
        said = self._stage("mask", 2, {client: (sealed[i], present[i]) for i, client in enumerate(said)})
        for client, masked in said.items():
            closing.masked([client], masked[None])
        alive = closing.alive(list(said))
        said = self._stage("open", 3, {client: (alive[i],) for i, client in enumerate(said)})
        return closing.total(list(said), stacked(said.values(), self.k + 1, OPENING))


def stacked(rows: Iterable[NDArray[np.uint8]], *shape: int) -> NDArray[np.uint8]:
    """Messages of several clients as one array; none of them: an empty one."""
    return np.stack([np.zeros(shape, dtype=np.uint8), *rows])[1:]


def ended(talk: Talk) -> tuple[NDArray[np.int64] | None, LichenError | None]:
    """The sum of a talk, or why there is none."""
    try:
        return talk.total(), None
    except LichenError as error:
        return None, error
