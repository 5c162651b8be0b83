"""Hides what a client sends in the sum of all: keys, shares, the masked vector and the opening, in four stages.

Any work may lie inside. Its message is lifted by the very aggregator that will close the sum, so that the sum of masked
vectors has the bytes of a round without masks. The client's half of the protocol is
:class:`lichen.core.masks.party.Party`; what comes back to the server is made by
:class:`lichen.engines.masking.unmasking.UnmaskingEngine`.

A talk that begins again goes on with the same party, and says the same; each job has fresh ones.

References:
    James Henry Bell, Kallista A. Bonawitz, Adrià Gascón, Tancrède Lepoint and Mariana Raykova. "Secure Single-Server
    Aggregation with (Poly)Logarithmic Overhead." CCS 2020. https://eprint.iacr.org/2020/704
    Keith Bonawitz et al. "Practical Secure Aggregation for Privacy-Preserving Machine Learning." CCS 2017.
    https://eprint.iacr.org/2017/281

Legend: C clients, k neighbours of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from lichen.clients.masking.noise_share import NoiseShare
from lichen.core.contracts.client import ClientWork
from lichen.core.contracts.model import Batch
from lichen.core.contracts.server import Aggregator
from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.fold import fold
from lichen.core.masks.party import ADVERT, OPENING, SEALED, Identity, Party
from lichen.core.message import Job, Message, size
from lichen.core.secret.randomness import SecretRandomness
from lichen.core.tree import Tree
from lichen.core.wire.answer import answer_size
from lichen.server.sums.masked import MaskedForm, form_of

__all__ = ["ATTEMPT", "MaskTerms", "Masked", "context_of"]

ATTEMPT = "masks_attempt"
"""A job's setting: how often its round was begun before."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MaskTerms:
    """What clients and server have agreed on beforehand.

    Attributes:
        k: Neighbours of each client.
        threshold: Shares that open a secret, of k + 1 holders.
        least: Clients in a sum, at least; the sum of fewer stays closed.
        run: What the run is known by; keys of one run open nothing of another.
    """

    k: int
    threshold: int
    least: int = 3
    run: str = ""


def context_of(terms: MaskTerms, job: Job) -> bytes:
    """What keys, shares and signatures of a job are bound to."""
    attempt = int(job.settings.get(ATTEMPT, 0))
    return "\x1f".join(["lichen masks", terms.run, job.work, *map(str, (job.version, job.seed, attempt))]).encode()


@final
@dataclass(slots=True, eq=False)
class _Secrets:
    """What a node remembers of a job: its parties, and who of them has sent its masked vector."""

    entropy: bytes = field(default_factory=partial(os.urandom, 32))
    parties: dict[int, Party] = field(default_factory=dict)
    sent: set[int] = field(default_factory=set)


def _never(job: Job, client: int) -> int | None:
    return None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """A work whose message is seen by nobody but as part of a sum.

    Attributes:
        inner: What is done; its message is clipped there.
        terms: As agreed.
        aggregator: Lifts the message; None: it has metrics alone.
        identity: Long-term keys, by which clients know one another; None: whoever carries the keys is believed.
        noise: What a client adds to the vector before it is masked; None: nothing.
        drops_out: The stage, from 0, in which a client falls silent: for simulation.
        secrets: Of one job; see :meth:`fresh`.
    """

    inner: ClientWork
    terms: MaskTerms
    aggregator: Aggregator | None = None
    identity: Identity | None = None
    noise: NoiseShare | None = None
    drops_out: Callable[[Job, int], int | None] = _never
    secrets: _Secrets = field(default_factory=_Secrets)

    def fresh(self) -> Masked:
        """The same with secrets that nobody has seen; for one job."""
        return replace(self, secrets=_Secrets())

    def form(self, job: Job) -> MaskedForm:
        """What lies under the masks; raises as :func:`lichen.server.sums.masked.form_of`."""
        return form_of(self.inner.expected(job), self.aggregator)

    def expected(self, job: Job) -> Expected:
        """What the server gets in the place of messages: their sum, once it is open."""
        return self.form(job).summed

    def opening(self, job: Job) -> Expected:
        """What a client sends last."""
        return _asks(self.form(job).group, opening=(self.terms.k + 1, OPENING))

    def questions(self, job: Job) -> Sequence[Expected]:
        """Keys, shares, the masked vector."""
        form, k = self.form(job), self.terms.k
        masked = TensorSpec((form.numbers,), torch.int64)
        return (
            _asks(form.group, advert=(ADVERT,)),
            _asks(form.group, sealed=(k, SEALED), commitments=(k + 1, 2, 32)),
            Expected(group=form.group, tensors={"masked": masked}, weight=(0.0, 0.0)),
        )

    def sizes(self, job: Job) -> tuple[tuple[int, int], ...]:
        """Bytes that one client sends and is answered in each of the four stages, beside the job itself.

        They are the same for any client, whatever its rows are and whoever falls silent.
        """
        k, declared = self.terms.k, (*self.questions(job), self.opening(job))
        answers = (
            {"ids": _nothing(torch.int64, k), "adverts": _nothing(torch.uint8, k, ADVERT)},
            {"sealed": _nothing(torch.uint8, k, SEALED), "present": _nothing(torch.bool, k)},
            {"alive": _nothing(torch.bool, k)},
        )
        up = []
        for expected in declared:
            tensors = {name: _nothing(spec.dtype, *spec.shape) for name, spec in expected.tensors.items()}
            up.append(size(_message(expected.group, job, (0,), tensors)))
        return tuple(zip(up, [*map(answer_size, answers), 0], strict=True))

    def talk(
        self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]
    ) -> Generator[Message, Tree, tuple[Message, Tree | None]]:
        """The four stages; training is in the third.

        Raises:
            LichenError: where a party refuses what it was sent, or a message cannot be lifted.
        """
        form = self.form(job)

        def say(**arrays: Sequence[NDArray[Any]]) -> Message:
            tensors = {name: torch.from_numpy(np.stack(rows)) for name, rows in arrays.items()}
            return _message(form.group, job, clients, tensors)

        parties = [self._party(job, client) for client in clients]
        self._speak(job, clients, 0)
        answer = _arrays((yield say(advert=[party.advertise() for party in parties])))
        self._speak(job, clients, 1)
        shared = [
            party.share(ids.tolist(), adverts)
            for party, ids, adverts in zip(parties, answer["ids"], answer["adverts"], strict=True)
        ]
        answer = _arrays((yield say(sealed=[s for s, _ in shared], commitments=[c for _, c in shared])))
        self._speak(job, clients, 2)
        for party, sealed, present in zip(parties, answer["sealed"], answer["present"], strict=True):
            party.receive(sealed, present.astype(bool))
        message, after_C = fold(self.inner, batches, job, clients, own_C)
        masked = self._masked(form, message, parties, job)
        del message
        self.secrets.sent.update(clients)
        question = say(masked=masked)
        del masked
        answer = _arrays((yield question))
        self._speak(job, clients, 3)
        openings = [party.open(alive.astype(bool)) for party, alive in zip(parties, answer["alive"], strict=True)]
        return say(opening=openings), after_C

    def _party(self, job: Job, client: int) -> Party:
        """The client's; the same one where a talk begins again."""
        if client not in self.secrets.parties:
            entropy = SecretRandomness(self.secrets.entropy).stream("masks", client).words(4).tobytes()
            self.secrets.parties[client] = Party(
                client,
                context_of(self.terms, job),
                entropy,
                k=self.terms.k,
                threshold=self.terms.threshold,
                identity=self.identity,
            )
        return self.secrets.parties[client]

    def _masked(self, form: MaskedForm, message: Message, parties: Sequence[Party], job: Job) -> list[NDArray[Any]]:
        lifted = message if self.aggregator is None else self.aggregator.lift(message)
        vectors, out = form.vector(lifted), list[NDArray[Any]]()
        secret = SecretRandomness(self.secrets.entropy)
        for party, client, units_N in zip(parties, message.client_C.tolist(), vectors, strict=True):
            if client in self.secrets.sent:  # a talk that begins again: this is not sent, and the mask is used up
                out.append(np.zeros(form.numbers, dtype=np.int64))
                continue
            if self.noise is not None:
                units_N = self.noise(form, units_N, job, client, secret.stream("noise", client))
            out.append(party.mask(units_N.numpy()))
        return out

    def _speak(self, job: Job, clients: Sequence[int], stage: int) -> None:
        """Nothing, unless one of them is to fall silent here."""
        gone = [client for client in clients if self.drops_out(job, client) == stage]
        if gone:
            raise LichenError("falls silent, as the recipe simulates it", where=f"stage {stage + 1}", reason="masks")


def _asks(group: str, **shapes: tuple[int, ...]) -> Expected:
    tensors = {name: TensorSpec(shape, torch.uint8) for name, shape in shapes.items()}
    return Expected(group=group, tensors=tensors, weight=(0.0, 0.0))


def _nothing(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Zeros of one client, which take no memory."""
    return torch.zeros((), dtype=dtype).expand(1, *shape)


def _message(group: str, job: Job, clients: Sequence[int], tensors: Tree) -> Message:
    return Message(
        group=group,
        client_C=torch.tensor(clients, dtype=torch.int64),
        version_C=torch.full((len(clients),), job.version, dtype=torch.int64),
        tensors=tensors,
        weight_C=torch.zeros(len(clients), dtype=torch.float64),
    )


def _arrays(answer_C: Tree) -> dict[str, NDArray[Any]]:
    return {name: x_C.cpu().numpy() for name, x_C in answer_C.items()}
