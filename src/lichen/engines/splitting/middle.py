"""The server's half of split training: the middle blocks, their adapter and its optimizer, for a job and a client.

A half lives as long as its job. What came last is remembered, and of all halves one graph at most is alive: where
another client has asked in between, the middle is run again on what it was given, which gives the same bits.

Legend: C = 1, B rows, T tokens, N tokens of all rows, H width.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.splitting.asking import GRADIENT, HIDDEN, LENGTH, SQUARES, Form
from lichen.clients.splitting.crossing import Rows
from lichen.clients.splitting.ends import Piece
from lichen.clients.splitting.remembered import MEMORY
from lichen.clients.splitting.whole_norm import cut_to_norm, squares
from lichen.clients.training.train import Train, TrainState
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

__all__ = ["Half", "Middle"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """The middle for one client.

    Attributes:
        state: Its tensors and their optimizer, before the next gradient.
        rows: Where the tokens of what came last lie; None where no gradient is awaited.
        batch: What came last.
        theirs: Trained tensors of the client.
        grads_C: Of the step that waits for the client's squares; empty where none does.
        seed: The job's.
        memory: What crossed last of the client's rows; empty where no changes are sent.
    """

    state: TrainState
    rows: Rows | None = None
    batch: Batch = field(default_factory=dict)
    theirs: tuple[str, ...] = ()
    grads_C: Tree = field(default_factory=dict)
    seed: int = 0
    memory: Tree = field(default_factory=dict)


@final
@dataclass(slots=True, eq=False)
class Middle:
    """The middle blocks of one cut.

    Attributes:
        piece: Gives hidden states at the second cut.
        train: How a client that holds the whole model would train.
        form: What crosses.
        clip: Norm that the gradient of the whole is cut to; None: ``train`` may cut this side's.
        names: Trained tensors of the middle.
    """

    piece: Piece
    train: Train
    form: Form
    clip: float | None = None
    names: frozenset[str] = field(init=False)
    _alive: tuple[Half, Tree, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        self.names = frozenset(self.piece.init(0))

    def start(self, job: Job, theirs: Job, client: int) -> Half:
        """The half of a client, at the middle's shared tensors.

        Args:
            job: With these tensors alone.
            theirs: With the client's.
            client: Whose it is.
        """
        return Half(
            state=self.train.init(job, (client,), None), theirs=tuple(self.train.trained(theirs)), seed=job.seed
        )

    def answer(self, half: Half, question: Tree, *, back: bool = True) -> tuple[Half, Tree]:
        """``(half, answer)`` to one client's question, its tensors ``(1, ...)``: a step by the squares or the gradient
        that have come, then hidden states for those that have come.

        Args:
            half: As the last answer left it.
            question: With some of the tensors of :mod:`lichen.clients.splitting.asking`.
            back: Answer a gradient with the one at the first cut.

        Raises:
            LichenError: if the lengths do not fit what came, or a gradient comes that is of nothing.
        """
        answer: Tree = {}
        if MEMORY in question:
            answer, memory = self.form.agreed(question, half.memory)
            return replace(half, memory=memory), answer
        came, (question, memory) = question, self.form.arrived(question, "up", question, half.memory)
        half = replace(half, memory=memory) if self.form.remembers else half
        if SQUARES in question:
            half = self._stepped(half, question[SQUARES])
        if GRADIENT in question:
            half, gradient = self._back(half, question[GRADIENT])
            if back:
                answer[GRADIENT] = gradient
            if self.clip is None:
                half = self._stepped(half)
            else:
                answer[SQUARES] = squares(half.grads_C)
        if (HIDDEN in question) != (LENGTH in question):
            raise LichenError("hidden states and their lengths do not come one by one", where="split", reason="names")
        if HIDDEN in question:
            self.check_over(half)
            half, answer[HIDDEN] = self._forward(half, question[HIDDEN], question[LENGTH][0])
        answer, memory = self.form.answer(answer, came, half.seed, half.memory)
        if not self.form.remembers:
            return half, answer
        after = replace(half, memory=memory)
        if self._alive is not None and self._alive[0] is half:
            self._alive = (after, *self._alive[1:])
        return after, answer

    def scored(self, job: Job, question: Tree) -> Tree:
        """The answer to a question of an evaluation, at the middle's shared tensors of a job."""
        rows = self._rows(question[LENGTH][0])
        came, question = question, self.form.decoded(question)
        with torch.no_grad():
            params_C = trees.expand(job.shared.trainable, 1)
            out_CBTH = self.piece.hidden(params_C, {}, rows.batch(question[HIDDEN]))
        return self.form.answer({HIDDEN: rows.flat(out_CBTH)}, came, job.seed, {})[0]

    def check_over(self, half: Half) -> None:
        """Refuse what comes while a step is not over.

        Raises:
            LichenError: if a gradient or squares have yet to come.
        """
        if half.rows is not None or half.grads_C:
            raise LichenError("the step before is not over: no gradient has come", where="split", reason="turn")

    def ended(self, half: Half) -> Message:
        """The change of the middle's tensors, as a message of its own."""
        return self.train.final(half.state)[0]

    def _rows(self, length_B: Tensor) -> Rows:
        if bool((length_B < 0).any()) or bool((length_B > self.form.most).any()):
            what = f"rows are said to be {int(length_B.min())} to {int(length_B.max())} tokens long"
            raise LichenError(what, where="split", fix=f"send 0 to {self.form.most}", reason="shape")
        return Rows.of(length_B, self.form.most)

    def _forward(self, half: Half, flat_CNH: Tensor, length_B: Tensor) -> tuple[Half, Tensor]:
        rows = self._rows(length_B)
        half = replace(half, rows=rows, batch=rows.batch(flat_CNH))
        leaves_C, entry, out = self._run(half)
        self._alive = (half, leaves_C, entry, out)
        return half, rows.flat(out.detach())

    def _run(self, half: Half) -> tuple[Tree, Tensor, Tensor]:
        """``(leaves, what comes in, what goes out)`` with a graph between them."""
        leaves_C = {name: x.detach().requires_grad_() for name, x in half.state.params_C.items()}
        entry = half.batch["hidden_CBTH"].detach().requires_grad_()
        with torch.enable_grad():
            params_C = {**leaves_C, **half.state.frozen_C}
            out = self.piece.hidden(params_C, half.state.fixed, {**half.batch, "hidden_CBTH": entry})
        return leaves_C, entry, out

    def _back(self, half: Half, flat_CNH: Tensor) -> tuple[Half, Tensor]:
        if half.rows is None:
            raise LichenError("a gradient comes for no hidden states", where="split", reason="turn")
        gradient_CBTH = half.rows.padded(flat_CNH)
        if self._alive is not None and self._alive[0] is half:
            leaves_C, entry, out = self._alive[1:]
        else:
            leaves_C, entry, out = self._run(half)
        self._alive = None
        *grads, below = torch.autograd.grad(
            out, [*leaves_C.values(), entry], gradient_CBTH.to(out), allow_unused=True, materialize_grads=True
        )
        flat = half.rows.flat(below)
        return replace(half, rows=None, batch={}, grads_C=dict(zip(leaves_C, grads, strict=True))), flat

    def _stepped(self, half: Half, theirs_CP: Tensor | None = None) -> Half:
        """After the step by its gradients, cut with the client's squares where the whole's norm is."""
        if not half.grads_C:
            raise LichenError("squares come for no gradient", where="split", reason="turn")
        grads_C = half.grads_C
        if self.clip is not None and theirs_CP is not None:
            grads_C = cut_to_norm(grads_C, self.clip, squares(grads_C), half.theirs, theirs_CP)
        nothing_C = torch.zeros(1, device=next(iter(grads_C.values())).device)
        seen = {"active_C": torch.ones(1, dtype=torch.bool)}
        return replace(half, state=self.train.stepped(half.state, seen, grads_C, nothing_C, nothing_C), grads_C={})
