"""The jobs of a node whose clients wait for an answer: each frame from the server has its frames in return.

A node speaks when it is spoken to. A job or an answer comes, and back goes a question, or a message and the end of the
job, or an error. So jobs of several clients can be open side by side over one pipe. Both ends count the jobs from 1;
an answer names its job by that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.fold import serve
from lichen.core.message import Job, pack_message
from lichen.core.store import ClientStore
from lichen.core.wire.answer import unpack_answer
from lichen.core.wire.frames import Frame
from lichen.engines.conversation import Conversation, asks_back

__all__ = ["NodeTalks"]


@final
class NodeTalks:
    """What a node does with jobs and answers.

    Args:
        client_tasks: What it can do.
        store: Private state of its clients.
        base: Digest of the frozen base it holds.
        device: Where its clients are trained.
    """

    def __init__(
        self, client_tasks: Mapping[str, ClientTask], store: ClientStore, *, base: str = "", device: str = "cpu"
    ) -> None:
        self.client_tasks, self.store, self.base, self.device = client_tasks, store, base, device
        self.jobs = 0
        self._open: dict[int, Conversation] = {}

    def begin(self, job: Job) -> Iterator[Frame]:
        """Do the newest job, up to its end or its first question.

        Raises:
            LichenError: if it cannot be done.
        """
        if not asks_back(job, self.client_tasks):
            for message in serve(job, self.client_tasks, self.store, base=self.base, block_size=1, device=self.device):
                yield b"M", pack_message(message)
            yield b".", b""
            return
        if len(job.clients) != 1:
            raise LichenError("a job whose clients ask back is one client's", where="job", fix="send each its own")
        conversation = Conversation(
            self.jobs, job, self.client_tasks, self.store, base=self.base, block_size=1, device=self.device
        )
        yield from self._go_on(conversation)

    def answer(self, body: bytes) -> Iterator[Frame]:
        """Go on with a job.

        Raises:
            LichenError: if it cannot be done, or nobody waits for this answer.
        """
        talk, answer = unpack_answer(body)
        conversation = self._open.pop(talk, None)
        if conversation is None:
            raise LichenError(f"nobody waits for an answer in job {talk}", where="node")
        answer_C = None if answer is None else {name: x.unsqueeze(0) for name, x in answer.items()}
        conversation.answer(conversation.job.clients, answer_C)
        yield from self._go_on(conversation)

    def _go_on(self, conversation: Conversation) -> Iterator[Frame]:
        reply = conversation.next()
        if reply is not None and reply.error is not None:
            raise reply.error
        if reply is not None and reply.message is not None:
            if reply.question:
                self._open[conversation.number] = conversation
                yield b"Q", pack_message(reply.message)
                return
            yield b"M", pack_message(reply.message)
        yield b".", b""
