"""What a site does with the frames that it is handed: each has its frames in return, whatever is in it.

A job of one client, or an answer to what the client has asked, goes in; out comes a question, or messages and the end
of the job, or an error. So jobs of several clients can be open side by side. An answer names its job by the order's
number.

What a client has sent is on the disk before anybody sees it, beside its private state. The same job is then answered
from there (:mod:`lichen.core.files.answers`). A job whose client asks back is not: its answers are not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import final

from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError, traceback_text
from lichen.core.files.answers import SavedAnswers
from lichen.core.fold import serve
from lichen.core.machine import machine_fault
from lichen.core.message import Job, pack_message, unpack_job
from lichen.core.store import ClientStore
from lichen.core.wire.answer import unpack_answer
from lichen.core.wire.frames import Frame, pack_error, write_frame
from lichen.core.wire.shared import Shared
from lichen.engines.conversation import Conversation, asks_back
from lichen.engines.remote.guard import Guard, Open
from lichen.transforms.codec import Chain
from lichen.transforms.downlink_cache import SnapshotCache

__all__ = ["Talks", "error_frame"]


@final
class Talks:
    """The clients of a site, with one private state each.

    Args:
        client_tasks: What they can do.
        store: Their private state; their answers are saved there, too.
        base: Digest of the frozen base the site holds.
        device: Where its clients are trained.
        down: What the server codes the steps of its view with.
        agreed: Shared tensors that server and clients hold before the first job.
        guard: Looks at jobs, and at what comes of them.
        around: Makes other frames of those that come of a client's job, for a test.
    """

    def __init__(
        self,
        client_tasks: Mapping[str, ClientTask],
        store: ClientStore,
        *,
        base: str = "",
        device: str = "cpu",
        down: Chain | None = None,
        agreed: Shared | None = None,
        guard: Guard = Open(),  # noqa: B008
        around: Callable[[Job, Iterator[Frame]], Iterable[Frame]] = lambda job, frames: frames,
    ) -> None:
        self.client_tasks, self.store, self.base, self.device = client_tasks, store, base, device
        self.saved, self.guard, self.around = SavedAnswers(store.folder), guard, around
        self.trained = 0
        self._snapshots = SnapshotCache(down, agreed)
        self._open: dict[tuple[int, int], Conversation] = {}

    def whole(self, data: bytes, *, recipe: str = "", invited: int = 0) -> tuple[Job, str]:
        """A job's bytes to the job, with all its shared tensors, and a digest of what is asked of each client.

        Args:
            data: The job.
            recipe: Digest of the recipe that it is of, as the server says.
            invited: Clients of the job in all sites, as the server says.

        Raises:
            LichenError: if the bytes are no job, go on from a view that this site lacks, or are not let pass.
        """
        job = self._snapshots.whole(unpack_job(data))
        try:
            self.guard.job(job, recipe=recipe, invited=invited)
        except LichenError as error:
            raise _declined(error) from None
        return job, _digest(job)

    def begin(self, order: int, job: Job, digest: str) -> bytes:
        """The frames of one client's job, up to its end or its first question."""
        before = self.trained
        frames = _written(self._begin(order, job, digest))
        return self._let_out(job, frames, anew=self.trained > before)

    def _begin(self, order: int, job: Job, digest: str) -> Iterator[Frame]:
        (client,) = job.clients
        digest = _of_client(job, digest)
        if asks_back(job, self.client_tasks):
            talk = Conversation(
                order, job, self.client_tasks, self.store, base=self.base, block_size=1, device=self.device
            )
            self.trained += 1
            yield from self._go_on(talk)
            return
        ahead = job.version + 1
        saved = self.saved.load(job.version, client, digest, self.store.digest(client, ahead))
        if saved is None:
            self.trained += 1
            saved = _joined(self.around(job, self._train(job)))
            self.saved.save(job.version, client, digest, saved, self.store.digest(client, ahead))
        yield b"", saved

    def again(self, job: Job, digest: str) -> Callable[[], bytes] | None:
        """What reads the frames of one client's job from the disk once more; None where they are not there."""
        (client,) = job.clients
        digest = _of_client(job, digest)
        if not self.saved.has(job.version, client, digest):
            return None
        return lambda: self.saved.load(job.version, client, digest) or error_frame(_LOST)

    def _train(self, job: Job) -> Iterator[Frame]:
        for message in serve(job, self.client_tasks, self.store, base=self.base, block_size=1, device=self.device):
            yield b"M", pack_message(message)
        yield b".", b""

    def answer(self, client: int, data: bytes) -> bytes:
        """The frames that come of answering a client."""
        try:
            order, answer = unpack_answer(data)
            talk = self._open.pop((order, client), None)
            if talk is None:
                raise LichenError(f"nobody waits for an answer in job {order}", where="node")
        except LichenError as error:
            return error_frame(error)
        return self._let_out(talk.job, _written(self._answer(talk, answer)), anew=False)

    def _answer(self, talk: Conversation, answer: trees.Tree | None) -> Iterator[Frame]:
        talk.answer(talk.job.clients, None if answer is None else trees.stack([answer]))
        yield from self._go_on(talk)

    def _go_on(self, talk: Conversation) -> Iterator[Frame]:
        reply = talk.next()
        if reply is not None and reply.error is not None:
            raise reply.error
        if reply is not None and reply.message is not None:
            if reply.question:
                self._open[talk.number, reply.clients[0]] = talk
                yield b"Q", pack_message(reply.message)
                return
            yield b"M", pack_message(reply.message)
        yield b".", b""

    def _let_out(self, job: Job, frames: bytes, *, anew: bool) -> bytes:
        """What has come of a client's job, where it may leave; else why it may not."""
        try:
            self.guard.frames(job, frames, anew=anew)
        except LichenError as error:
            return error_frame(_declined(error))
        except Exception as error:  # a full disk, where the guard counts: the thread that trains lives on
            return error_frame(error)
        return frames

    def drop(self, order: int | None = None) -> None:
        """Forget what clients wait for in an order that was given up; None: in all."""
        self._open = {key: talk for key, talk in self._open.items() if order is not None and key[0] != order}


_LOST = LichenError("its saved answer has gone from the disk", where="node", fix="ask again")


def _declined(error: LichenError) -> LichenError:
    return LichenError(error.what, where=error.where, fix=error.fix, reason="declined")


def _digest(job: Job) -> str:
    """Of all that a client's answer follows from, but for who it is and what it keeps to itself."""
    about = [job.work, job.version, job.seed, job.base, sorted(job.settings.items()), job.texts]
    shared = job.snapshot or trees.digest(job.shared.flat())
    return hashlib.sha256(json.dumps([*about, shared]).encode()).hexdigest()


def _of_client(job: Job, digest: str) -> str:
    """The digest of one client's job, which says from which private state it goes on where that is not the newest."""
    before = [job.rollback[client] for client in job.clients if client in job.rollback]
    return hashlib.sha256(f"{digest} {before}".encode()).hexdigest() if before else digest


def _joined(frames: Iterable[Frame]) -> bytes:
    sink = io.BytesIO()
    for kind, body in frames:
        if kind:
            write_frame(sink, kind, body)
        else:  # frames already
            sink.write(body)
    return sink.getvalue()


def _written(frames: Iterator[Frame]) -> bytes:
    """Frames as bytes; whatever goes wrong is one of them."""
    try:
        return _joined(frames)
    except Exception as error:
        return error_frame(error)


def error_frame(error: Exception) -> bytes:
    """The frame that tells an error; of a fault its kind and place alone: its words may be somebody's row.

    What the machine refuses is said here with its path, and goes up without it.
    """
    if not isinstance(error, LichenError):
        refused = machine_fault(error)
        print(traceback_text(error) if refused is None else refused, file=sys.stderr, flush=True)
        if refused is None:
            what, fix = f"a fault of the node: {type(error).__name__}{_place_of(error)}", ""
        else:
            what, fix = refused.what, refused.fix
        error = LichenError(what, where="node", fix=fix)
    return _joined([(b"E", pack_error(error))])


def _place_of(error: Exception) -> str:
    """The line that raised it."""
    steps = traceback.extract_tb(error.__traceback__)
    return f" at {Path(steps[-1].filename).name}:{steps[-1].lineno}" if steps else ""
