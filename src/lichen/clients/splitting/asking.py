"""What a client of a split model may ask its server, and the questions themselves.

Where the recipe has a code, hidden states and gradients cross as it makes them, up and down; noise lies on what goes
up, before it is coded. Where the code sends changes, those are of hidden states alone, by row
(:mod:`lichen.clients.splitting.remembered`); a gradient has nothing to be a change of. The draws of a question follow
from the job's seed, the client and the question's number, those of an answer from the job's seed and the bytes that it
answers, so that an answer depends on nothing else but what is remembered.

Legend: C = 1, B rows, N tokens of all rows, H width, K bytes of a coded token, P trained tensors of one side.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from lichen.clients.splitting.remembered import (
    AGREED,
    INDEX,
    MEMORY,
    WHOLE,
    Way,
    decode_rows,
    encode_rows,
    stamp,
)
from lichen.core.errors import LichenError
from lichen.core.expected import ANY, Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.transforms.activations import ActivationCode, noisy_tokens

__all__ = ["GRADIENT", "HIDDEN", "LENGTH", "SQUARES", "Form", "received"]

HIDDEN, GRADIENT, LENGTH, SQUARES = "hidden", "gradient", "length", "squares"
"""Tensors of questions and answers: hidden states or their gradients ``(N, H)``, the rows' lengths ``(B,)``, and the
squared norms of one side's gradients ``(P,)``."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What crosses in one question.

    Attributes:
        group: The whole model's.
        rows: B of a batch.
        most: Tokens of a row, at most.
        width: H.
        dtype: Of hidden states.
        code: How hidden states and gradients cross; None: as they are.
        noise: On those that go up, relative to the norm of each token's.
        numbered: Rows of a client, of which both sides remember what crossed last, where changes are sent.
    """

    group: str
    rows: int
    most: int
    width: int
    dtype: torch.dtype = torch.float32
    code: ActivationCode | None = None
    noise: float = 0.0
    numbered: int = 0

    @property
    def remembers(self) -> bool:
        """Whether changes are sent."""
        return self.code is not None and self.code.change

    @property
    def token(self) -> TensorSpec:
        """The tokens of a question or an answer, as they cross: ``(N, H)`` numbers or ``(N, K)`` bytes."""
        if self.code is None:
            return TensorSpec((ANY, self.width), self.dtype)
        return TensorSpec((ANY, self.code.nbytes(self.width)), torch.uint8)

    def expected(self, *names: str, squares: int = 0, optional: bool = False) -> Expected:
        """A question with these tensors, or with some of them; and how many squares there are."""
        specs = {HIDDEN: self.token, GRADIENT: self.token, LENGTH: TensorSpec((self.rows,), torch.int32)}
        specs[SQUARES] = TensorSpec((squares,))
        more = 0
        if self.remembers and HIDDEN in names:
            specs[WHOLE], specs[INDEX] = (
                TensorSpec((ANY, self.width), self.dtype),
                TensorSpec((self.rows,), torch.int32),
            )
            names, more = (*names, WHOLE, INDEX), self.rows * self.most * self.width
        return Expected(
            group=self.group,
            tensors={name: specs[name] for name in names},
            weight=(0.0, 0.0),
            numbers=len(names) * (self.rows * self.most * self.token.shape[1] + self.rows) + squares + more,
            optional=frozenset(names) if optional else frozenset(),
        )

    @property
    def first(self) -> Expected:
        """The question before all others, where changes are sent."""
        return Expected(
            group=self.group, tensors={MEMORY: TensorSpec((16,), torch.uint8)}, weight=(0.0, 0.0), numbers=16
        )

    def question(self, job: Job, clients: Sequence[int], number: int, **tensors: Tensor) -> Message:
        """What is asked as a client's question of this number, with tensors ``(1, ...)``, noisy and coded."""
        return self.coded_question(job, clients, number, {}, **tensors)[0]

    def coded_question(
        self, job: Job, clients: Sequence[int], number: int, memory: Tree, /, **tensors: Tensor
    ) -> tuple[Message, Tree]:
        """:meth:`question`, and what is remembered then; with ``index`` where changes are sent."""
        seed = derive(job.seed, job.work, clients[0], "question", number)
        for name in (HIDDEN, GRADIENT):
            if name in tensors:
                tensors[name] = noisy_tokens(tensors[name], self.noise, [derive(seed, name)])
        tree, memory = self._departing(tensors, "up", tensors, memory, seed)
        return self._message(job, clients, tree), memory

    def _message(self, job: Job, clients: Sequence[int], tensors: Tree) -> Message:
        return Message(
            group=self.group,
            client_C=torch.tensor(clients, dtype=torch.int64),
            version_C=torch.full((len(clients),), job.version, dtype=torch.int64),
            tensors=tensors,
            weight_C=torch.zeros(len(clients), dtype=torch.float64),
        )

    def answer(self, tensors: Tree, question: Mapping[str, Tensor], seed: int, memory: Tree) -> tuple[Tree, Tree]:
        """What is answered to a question as it came, coded; and what is remembered then."""
        if self.code is None:
            return tensors, memory
        came = [zlib.crc32(x.contiguous().cpu().numpy().tobytes()) for _, x in sorted(question.items())]
        return self._departing(tensors, "down", question, memory, derive(seed, "answer", *came))

    def agreed(self, question: Mapping[str, Tensor], memory: Tree) -> tuple[Tree, Tree]:
        """``(answer, memory)`` to a client's first question: the server's memory where the client's is the same."""
        same = torch.equal(question[MEMORY].cpu(), stamp(memory))
        return {AGREED: torch.tensor([[int(same)]], dtype=torch.uint8)}, memory if same else {}

    def arrived(
        self, tensors: Mapping[str, Tensor], way: Way, rows: Mapping[str, Tensor], memory: Tree
    ) -> tuple[Tree, Tree]:
        """:meth:`decoded`, and what is remembered then.

        Args:
            tensors: Of a question or an answer.
            way: To the server or from it.
            rows: With ``length`` and, where changes are sent, ``index``, each ``(1, B)``.
            memory: What is remembered of rows.

        Raises:
            LichenError: if they do not have the code's bytes, or do not fit the rows.
        """
        tree: Tree = dict(tensors)
        if not self.remembers or HIDDEN not in tree:
            return self.decoded(tree), memory
        assert self.code is not None
        if WHOLE not in tree or LENGTH not in rows or INDEX not in rows:
            what = "hidden states, new rows, their numbers and lengths do not come one by one"
            raise LichenError(what, where="split", reason="names")
        length_B, index_B = rows[LENGTH][0].cpu(), rows[INDEX][0].cpu()
        if bool((length_B > self.most).any()) or bool((index_B >= self.numbered).any()):
            what = f"rows are numbered up to {int(index_B.max())}, and up to {int(length_B.max())} tokens long"
            fix = f"send numbers below {self.numbered} and at most {self.most} tokens"
            raise LichenError(what, where="split", fix=fix, reason="shape")
        came = (tree.pop(HIDDEN), tree.pop(WHOLE))
        hidden, memory = decode_rows(self.code, came, way, length_B, index_B, memory)
        return {**self.decoded(tree), HIDDEN: hidden.to(self.dtype)}, memory

    def _departing(
        self, tensors: Mapping[str, Tensor], way: Way, rows: Mapping[str, Tensor], memory: Tree, seed: int
    ) -> tuple[Tree, Tree]:
        """Tensors as they cross, and what is remembered then."""
        if not self.remembers or HIDDEN not in tensors:
            return self._encoded(tensors, seed), memory
        assert self.code is not None
        tree, about = dict(tensors), (rows[LENGTH][0].cpu(), rows[INDEX][0].cpu())
        left, memory = encode_rows(self.code, tree.pop(HIDDEN), way, *about, memory, derive(seed, HIDDEN))
        return {**self._encoded(tree, seed), HIDDEN: left[0], WHOLE: left[1]}, memory

    def decoded(self, tensors: Mapping[str, Tensor]) -> Tree:
        """The tensors of a question or an answer, those that crossed coded as numbers again.

        Raises:
            LichenError: if they do not have the code's bytes.
        """
        tree: Tree = dict(tensors)
        for name in (HIDDEN, GRADIENT) if self.code is not None else ():
            if (x := tree.get(name)) is not None:
                assert self.code is not None
                alone = replace(self.code, change=False)
                tree[name] = alone.decode(x, *_one_row(x), {}, self.width)[0].to(self.dtype)
        return tree

    def _encoded(self, tensors: Mapping[str, Tensor], seed: int) -> Tree:
        tree: Tree = dict(tensors)
        for name in (HIDDEN, GRADIENT) if self.code is not None else ():
            if (x := tree.get(name)) is not None:
                assert self.code is not None
                alone = replace(self.code, change=False)
                tree[name] = alone.encode(x, *_one_row(x), {}, [derive(seed, name)])[0]
        return tree


def _one_row(x_CN: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens as one row of which nothing is remembered."""
    count = x_CN.shape[1] if x_CN.dim() > 1 else 0
    return torch.tensor([count]), torch.tensor([-1])


def received(answer_C: Mapping[str, Tensor], name: str, like_CNH: Tensor) -> Tensor:
    """A tensor of an answer, shaped as what was sent.

    Raises:
        LichenError: if it is not there, or has another shape or a number that is none.
    """
    tree: Tree = dict(answer_C)
    x = tree.get(name)
    if x is None or x.shape != like_CNH.shape or not bool(x.isfinite().all()):
        shape = "nothing" if x is None else f"shape {tuple(x.shape)}"
        what = f"the server answers with {shape} in place of {name} of {tuple(like_CNH.shape)}"
        raise LichenError(what, where="split", fix="the server must hold the middle of the same model")
    return x.to(like_CNH)
