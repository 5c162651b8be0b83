"""The contracts of clients, aggregators, algorithms and engines: read first, then :mod:`lichen.core.rounds`.

The client is a fold over batches. The server is a fold over messages. A Message is all that crosses
between them. Alone is a cohort of one: the same client work runs C clients side by side over one
frozen model in simulation, and one client on its own machine, with the same numbers.

Legend: C clients, B rows of a batch, T tokens, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final, runtime_checkable

from torch import Tensor

from lichen.core.expected import Expected, MetricSpec
from lichen.core.message import Job, Message
from lichen.core.replies import ATTENDED, Attendance, Reply
from lichen.core.timing.flight import Flight
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = [
    "Aggregator",
    "Algorithm",
    "Batch",
    "ClientTask",
    "ClientWork",
    "CohortModel",
    "Costed",
    "Dialogue",
    "Engine",
    "Needs",
    "Objective",
    "Receives",
    "Report",
    "Sampler",
    "ServerOptimizer",
    "ServerState",
    "Source",
    "Submodel",
]

Batch = Mapping[str, Tensor]
"""One step of C clients, on the host: whoever computes moves what it needs. Every tensor has a leading client axis.

==================  =======================================================================
``active_C``        bool, False where this client has no such step (always present)
``input_ids_CBT``   int64 tokens, with ``attention_mask_CBT`` int64
``labels_CBT``      int64, language modelling: -100 where no loss is taken; position t holds
                    the label OF token t (models shift inside, as transformers does)
``labels_CB``       int64 class, -100 where the row has none (padding rows, unlabelled rows); or float32
                    numbers ``(C, B, ...)``, not-a-number where the row has none
``x_CBF`` (any)     float32 features or pixels of rows without tokens, ``(C, B, ...)``
``answer_CB``       int64 row of the shared ``answers.*`` tensors, -1 where the row has none
``index_CB``        int64 position of the row in the client's shard, -1 for padding rows
==================  =======================================================================
"""


class Objective(Protocol):
    """What a model's outputs are held against when it is scored; see :mod:`lichen.models.objectives`."""

    @property
    def classes(self) -> int | None:
        """Number of classes among which rows are told; None where there are none."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """A client's sums by name; ``loss_sum`` and ``count``, both single numbers, are among them."""
        ...

    def specs(self) -> Mapping[str, MetricSpec]:
        """What those sums can be, by the same names; :func:`lichen.core.expected.sums_of` where little is known."""
        ...

    def sums(self, model: CohortModel, params_C: Tree, fixed: Tree, batch: Batch) -> Tree:
        """Those sums over one batch, ``(C, ...)``; rows without a label count for nothing."""
        ...

    def made_up(self, ids_CBT: Tensor, mask_CBT: Tensor) -> Tree:
        """The labels that made-up rows of tokens might have, as a batch names them."""
        ...


class CohortModel(Protocol):
    """A model that runs C clients at once: frozen parts held once, trainable parts with a client axis."""

    name: str
    base: str
    """Digest of the frozen parts; empty where there are none."""
    group: str
    """What must be equal for two clients' messages to stack."""
    classes: int | None
    """Number of classes among which rows are told; None where there are none."""
    reference: bool
    """Every client's numbers have the same bits in any company."""

    @property
    def objective(self) -> Objective:
        """What it is scored by."""
        ...

    def init(self, seed: int) -> Tree:
        """Trainable tensors without client axis, as every client starts from them."""
        ...

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)``: the SUM of losses over each client's labelled tokens or rows, and their number.

        ``trainable_C`` is stacked; ``fixed`` (``patch.*``, ``answers.*``) has no client axis. Client
        c's loss depends on nothing but row c of everything.
        """
        ...

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``: the same of each row, 0 where it has no label; for what needs each row's gradient.

        Summed over rows they are :meth:`loss` but for rounding: where both see logits of the same bits and add n
        terms that are not negative, they lie within ``2 n u`` of one another, relatively; u is the unit roundoff of
        the losses, 2^-24 in float32.

        Raises:
            LichenError: if the loss is no sum over rows.
        """
        ...

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK`` of a classifier.

        Raises:
            LichenError: for a language model, whose logits are never held whole.
        """
        ...


class Source(Protocol):
    """Where a work's batches come from: on a real node the client's own files, in simulation all of them."""

    def shape(self, client: int) -> Hashable:
        """Clients of equal shape may share a block: the padding follows from the client's own data."""
        ...

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """Steps for these clients side by side, every client's rows drawn from ``(seed, client)`` alone."""
        ...


@runtime_checkable
class Costed(Protocol):
    """What a source may also have: how dear a client is, so that many can be dealt out evenly."""

    def cost(self, client: int) -> int:
        """Tokens of all its batches, or rows where there are no tokens; padding left out."""
        ...


class ClientWork(Protocol):
    """A fold over batches, run by every engine through :func:`lichen.core.fold.serve`.

    What its messages are is declared beforehand, so that a server can tell an honest one from damage and from lies.
    """

    def expected(self, job: Job) -> Expected:
        """What any client's message to this job must be, from the job alone: no row is looked at, nothing is copied."""
        ...

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> Any:
        """State of a block of clients. ``own_C`` is their stacked private state, None at their first time."""
        ...

    def step(self, state: Any, batch: Batch) -> Any:
        """The state after one batch; inactive clients stay bit-unchanged."""
        ...

    def final(self, state: Any) -> tuple[Message, Tree | None]:
        """The message that leaves, and the stacked private state that never does (None: keep none)."""
        ...


@runtime_checkable
class Dialogue(Protocol):
    """A client work that asks back within a job: masks need keys and shares, split learning gradients at a layer.

    A client work is one that has no questions. How they are answered is a value, too: ``lichen.engines.turns``.
    """

    def questions(self, job: Job) -> Sequence[Expected]:
        """What each question of a client must be, in their order, declared from the job alone; it asks no more."""
        ...

    def expected(self, job: Job) -> Expected:
        """What its message must be, as with any work."""
        ...

    def talk(
        self, job: Job, clients: Sequence[int], own_C: Tree | None, batches: Iterable[Batch]
    ) -> Generator[Message, Tree, tuple[Message, Tree | None]]:
        """Yield a question of all these clients, be sent their answers, ``(C, ...)``; end as ``final`` does.

        On a node the job names its own client alone; whom else it concerns comes with an answer. The talk depends on
        nothing but its arguments and the answers: where some of a block must go on alone, it is run again with the
        answers they have had. It does not yield inside a context such as ``torch.no_grad``, which would hold for
        whoever runs meanwhile.
        """
        ...


@runtime_checkable
class Receives(Protocol):
    """A client work whose messages are not yet what an aggregator takes when they arrive."""

    def received(self, message: Message, job: Job) -> Message:
        """An admitted message as the aggregator gets it.

        Raises:
            LichenError: if it cannot be made so; the message is refused.
        """
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTask:
    """One thing a node can be asked to do: a work and the batches it folds over."""

    work: ClientWork | Dialogue
    source: Source


Needs = Literal["sum", "single"]
"""What an aggregator needs of messages: their sum, or to see each."""


class Aggregator(Protocol):
    """A monoid over messages: ``zero``, ``add``, ``merge``, ``close``; the same bytes in any order.

    :mod:`lichen.fl.testing` holds its laws.
    """

    @property
    def needs(self) -> Needs:
        """``"sum"``: :meth:`close` is a function of one sum of integers, which can be taken under masks;
        ``"single"``: the server must look at single messages.
        """
        ...

    def zero(self) -> Any: ...
    def lift(self, message: Message, discount_C: Tensor | None = None) -> Message:
        """The client's half of :meth:`add`: the message weighed and rounded to int64, so that it only has to be added.

        It runs at the client where masks lie over its result, and nowhere else by need: ``add`` of a raw
        message gives the bytes of ``add`` of the lifted one. Its form: :mod:`lichen.server.sums.lifted`.

        Raises:
            LichenError: if a number is past what a lifted one may be, or the aggregator needs single messages.
        """
        ...

    def add(self, total: Any, message: Message, discount_C: Tensor | None = None) -> Any:
        """Fold every client of ``message`` in, raw or lifted.

        Args:
            total: What was folded in so far; it stays as it is.
            message: From any clients.
            discount_C: ``(C,)`` from 0 to 1, by age of the messages: multiplies each client's weight, whatever
                that is made of. None: 1. A lifted message was discounted when it was lifted.
        """
        ...

    def clients(self, total: Any) -> int:
        """Clients folded in, those of weight 0 left out; 0 means that there is nothing to close."""
        ...

    def merge(self, a: Any, b: Any) -> Any: ...
    def close(self, total: Any, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``(change, metrics)``: how far trainable tensors move; patches and frozen tensors replace those of their
        names as they are.

        Raises:
            LichenError: if nothing was folded in.
        """
        ...

    def dump(self, total: Any) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` that stand for a total, so that it can cross between processes.

        The header is what JSON can write, integers of any size among it.
        """
        ...

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> Any:
        """Undo :meth:`dump`: the total merges and closes to the same bytes.

        Raises:
            LichenError: if these are not a total of this aggregator.
        """
        ...


class ServerOptimizer(Protocol):
    """Turns the round's mean change into the next shared tensors."""

    def init(self, shared: Shared) -> Tree: ...
    def update(self, change: Shared, state: Tree, shared: Shared) -> tuple[Shared, Tree]:
        """``(shared, state)`` after one step; only names of the change are touched."""
        ...


class Submodel(Protocol):
    """What weaker clients get of the shared tensors: fewer layers, or a lower rank."""

    def key(self, client: int) -> Hashable:
        """Clients of equal key get equal tensors."""
        ...

    def extract(self, shared: Shared, key: Hashable) -> Shared:
        """The tensors of a job for clients of this key."""
        ...


class Sampler(Protocol):
    """Who is invited."""

    def invite(self, weight_N: Tensor, seed: int) -> tuple[int, ...]:
        """Roster indices, ascending, drawn from ``seed``; ``weight_N`` are the clients' example counts."""
        ...


class Engine(Protocol):
    """Transport and time: carries jobs out and replies back, in this process, in others, or over a network.

    :func:`lichen.core.collecting.collect.collect` is what algorithms use it by.

    Where several ranks run one program, each calls the same methods in the same order; ``replies`` yields
    a rank its own clients' replies, and ``merge`` and ``join`` make the ranks' parts one. Bytes are
    counted between clients and server, and are everybody's after either of the two.
    """

    @property
    def bytes_up(self) -> int:
        """Bytes from clients to server so far."""
        ...

    @property
    def bytes_down(self) -> int:
        """Bytes from server to clients so far."""
        ...

    def submit(self, job: Job) -> int:
        """Send a job out; the number by which its replies are known."""
        ...

    def replies(self, numbers: Collection[int], until: float = math.inf) -> Iterator[Reply]:
        """Replies to these jobs, as they arrive, C ≥ 1 clients each; counts what would cross.

        Ends when every client of these jobs has replied or waits for an answer, or at ``until`` on this engine's
        clock. Whoever stops listening before may call again, and hears the rest; replies to other jobs wait.
        """
        ...

    def answer(self, number: int, clients: Sequence[int], answer_C: Tree | None) -> None:
        """Answer what these clients of a job have asked, and go on with them; whoever does not wait gets nothing.

        Args:
            number: The job's.
            clients: Some of those whose question was yielded.
            answer_C: Stacked in their order. None: they are dismissed, and no reply of theirs is yielded any more,
                whether they have asked or not.
        """
        ...

    def cancel(self, number: int) -> None:
        """Give a job up: no reply to it is yielded any more. Nothing happens where all have come."""
        ...

    def now(self) -> float:
        """Seconds on this engine's clock, from any beginning."""
        ...

    def merge(self, aggregator: Aggregator, total: Any) -> Any:
        """The total of all ranks; ``total`` itself where there is one."""
        ...

    def join(
        self, client_N: Tensor, metrics: Tree, lines: Sequence[Sequence[str]] = ()
    ) -> tuple[Tensor, Tree, tuple[tuple[str, ...], ...]]:
        """``(client_N, metrics, lines)`` of all ranks: sorted by client, metrics ``(N, ...)``; lines in the ranks'
        order."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """Everything the server must remember between rounds; written at each round's end.

    Attributes:
        round: Rounds finished; also the version of ``shared``.
        shared: The shared tensors.
        optimizer: State of the server optimizer.
        best: ``shared`` of the best validated round; empty before the first validation.
        best_round: Its round, -1 before.
        best_value: Its validation value, NaN before.
        downlink: What clients hold and how they are brought further; empty where all is sent whole.
        in_flight: Jobs that somebody has yet to answer, with the tensors they were sent; oldest first.
        clock: Seconds since the start, where the engine has a virtual clock.
    """

    round: int
    shared: Shared
    optimizer: Tree = field(default_factory=dict)
    best: Shared = field(default_factory=Shared)
    best_round: int = -1
    best_value: float = float("nan")
    downlink: Tree = field(default_factory=dict)
    in_flight: tuple[Flight, ...] = ()
    clock: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One finished round, for the observers, who read and cannot steer.

    Attributes:
        round: Rounds finished, from 1.
        clients: Who was asked in this round.
        metrics: Scalars such as ``loss``, ``valid``, ``deviation``; ``time``, the virtual seconds since the start.
        tokens: Tokens (or rows) the clients trained on, padding left out.
        bytes_up: Bytes from clients to server in this round.
        bytes_down: Bytes from server to clients in this round.
        seconds: Wall time of the round.
        valid_up: Of ``bytes_up``, those of validation.
        valid_down: Of ``bytes_down``, those of validation.
        attendance: Who answered, what was refused and why.
    """

    round: int
    clients: tuple[int, ...]
    metrics: Mapping[str, float]
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    valid_up: int = 0
    valid_down: int = 0
    attendance: Attendance = ATTENDED


class Algorithm(Protocol):
    """The server's side of one round."""

    def init(self, shared: Shared) -> ServerState: ...
    def round(self, state: ServerState, engine: Engine, seed: int) -> tuple[ServerState, Report]: ...
