"""A node's side of a job whose clients ask back: blocks that wait for answers, beside those that have theirs.

A block that has its answers goes on before another begins, so that where each question is answered at once no more
than one block is in memory. Where all must ask before anybody is answered, all are.

A block is parted where one of its clients fails or is dismissed, or memory runs out. The parts begin again and are
sent the answers that they have had already: a dialogue depends on nothing else, so that the others' numbers have the
same bits as if they had stood alone from the beginning.

Legend: C clients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from lichen.core import tree as trees
from lichen.core.contracts.client import ClientTask, Dialogue, Freshened
from lichen.core.errors import LichenError
from lichen.core.fold import BEST, ClientsPerBlock, half_of, is_dialogue, is_out_of_memory, task_and_blocks
from lichen.core.message import Job, Message
from lichen.core.replies import Reply
from lichen.core.store import ClientStore
from lichen.core.tree import Tree

__all__ = ["Conversation", "asks_back"]


def asks_back(job: Job, client_tasks: Mapping[str, ClientTask]) -> bool:
    """Whether the work of a job is a dialogue."""
    return job.work in client_tasks and is_dialogue(type(client_tasks[job.work].work))


@final
@dataclass(slots=True, eq=False)
class _Block:
    """Clients that stand side by side, what they were answered so far, and what of the next answer has come."""

    clients: tuple[int, ...]
    answers: list[Tree] = field(default_factory=list)
    talk: Generator[Message, Tree, tuple[Message, Tree | None]] | None = None
    next: dict[int, Tree] = field(default_factory=dict)

    def part(self, positions: Sequence[int]) -> _Block:
        """Some of its clients, who begin again."""
        at = list(positions)
        answers = [{name: x_C[at] for name, x_C in answer.items()} for answer in self.answers]
        return _Block(tuple(self.clients[c] for c in at), answers)


@final
class Conversation:
    """One job of a node, which goes on as far as it can whenever :meth:`next` is called.

    Args:
        number: What its replies are known by.
        job: What is asked; its work is a dialogue.
        client_tasks: What this node can do.
        store: Private state of its clients; staged where a client has come to its end.
        base: Digest of the frozen base this node holds.
        block_size: Clients side by side, or what finds it.
        device: Where tensors are brought before the work sees them.
    """

    def __init__(
        self,
        number: int,
        job: Job,
        client_tasks: Mapping[str, ClientTask],
        store: ClientStore,
        *,
        base: str = "",
        block_size: int | ClientsPerBlock = 8,
        device: str = "cpu",
    ) -> None:
        self.number, self.job, self.client_tasks, self.store = number, job, client_tasks, store
        self.base, self.block_size, self.device = base, block_size, device
        self._begun, self._task = False, client_tasks[job.work]
        self._new, self._ready = deque[_Block](), deque[_Block]()
        self._asking: dict[int, _Block] = {}  # each client that waits, and its block
        self._dismissed: set[int] = set()

    @property
    def ended(self) -> bool:
        """Whether nothing will come any more."""
        return self._begun and not (self._new or self._ready or self._asking)

    def next(self) -> Reply | None:
        """A message, a question or an error; None where all have come to their end or wait for an answer."""
        if not self._begun and (reply := self._begin()) is not None:
            return reply
        while self._ready or self._new:
            block = self._ready.popleft() if self._ready else self._new.popleft()
            if (reply := self._advance(block)) is not None:
                return reply
        return None

    def answer(self, clients: Sequence[int], answer_C: Tree | None) -> int:
        """Answer clients, or dismiss them; how many of them had been waiting."""
        waited = 0
        for position, client in enumerate(clients):
            block = self._asking.pop(client, None)
            waited += block is not None
            if answer_C is None:
                self._dismissed.add(client)
            if block is not None:
                block.next[client] = trees.take(answer_C, position) if answer_C is not None else {}
                if len(block.next) == len(block.clients):
                    self._ready.append(block)
        return waited

    def _begin(self) -> Reply | None:
        """Find the blocks; a reply for all clients where there are none."""
        self._begun = True
        self.job = replace(self.job, shared=self.job.shared.to(self.device))
        try:
            self._task, blocks = task_and_blocks(
                self.job, self.client_tasks, self.store, base=self.base, block_size=self.block_size
            )
        except LichenError as error:
            return Reply(job=self.number, clients=self.job.clients, error=error)
        if isinstance(self._task.work, Freshened):
            self._task = replace(self._task, work=self._task.work.fresh())
        self._new.extend(_Block(clients) for clients in blocks)
        return None

    def _advance(self, block: _Block) -> Reply | None:
        """What a block says next; None where it was parted instead, or nobody of it is there any more."""
        there = [c for c, client in enumerate(block.clients) if client not in self._dismissed]
        if len(there) < len(block.clients):
            block.talk, rest = None, block.part(there)
            if there and block.next:
                rest.answers.append(self._stacked(block.next[client] for client in rest.clients))
            if there:
                self._ready.appendleft(rest)
            return None
        if block.next:
            answer_C = self._stacked(block.next[client] for client in block.clients)
            # Who stands alone is never parted: nothing of what it was answered is needed again.
            block.answers = [*block.answers, answer_C] if len(block.clients) > 1 else [answer_C]
            block.next = {}
        try:
            utterance = self._resume(block)
        except LichenError as error:
            block.talk = None
            if len(block.clients) == 1:
                return Reply(job=self.number, clients=block.clients, error=error, reason=error.reason or "error")
            self._ready.extendleft(block.part([c]) for c in reversed(range(len(block.clients))))
            return None
        if utterance is None:
            return self._halved(block)
        if isinstance(utterance, Message):
            self._asking.update(dict.fromkeys(block.clients, block))
            return Reply(job=self.number, clients=block.clients, message=utterance, question=True)
        message, own_C = utterance
        if own_C is not None:
            best = int(self.job.settings.get(BEST, -1))
            self.store.stage(block.clients, self.job.version + 1, own_C, best=best)
        return Reply(job=self.number, clients=block.clients, message=message)

    def _stacked(self, answers: Iterable[Tree]) -> Tree:
        return trees.to_device(trees.stack(list(answers)), self.device)

    def _resume(self, block: _Block) -> Message | tuple[Message, Tree | None] | None:
        """A question, or what it ends with; None where memory ran out."""
        try:
            if block.talk is not None:
                return block.talk.send(block.answers[-1])
            block.talk = self._talk(block)
            question = next(block.talk)
            for answer_C in block.answers:
                question = block.talk.send(answer_C)
            return question
        except StopIteration as end:
            ending: tuple[Message, Tree | None] = end.value
            return ending
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _talk(self, block: _Block) -> Generator[Message, Tree, tuple[Message, Tree | None]]:
        work, source = self._task.work, self._task.source
        if not isinstance(work, Dialogue):  # no job comes here whose work is none
            raise TypeError(f"{type(work).__name__} asks nothing")
        own_C = self.store.load(block.clients, self.job.version)
        own_C = None if own_C is None else trees.to_device(own_C, self.device)
        return work.talk(self.job, block.clients, own_C, source.batches(block.clients, self.job.seed))

    def _halved(self, block: _Block) -> Reply | None:
        """Put halves in a block's place."""
        block.talk = None
        try:
            half = half_of(block.clients, self.device)
        except LichenError as error:
            return Reply(job=self.number, clients=block.clients, error=error)
        every = range(len(block.clients))
        self._ready.extendleft([block.part(every[half:]), block.part(every[:half])])
        return None
