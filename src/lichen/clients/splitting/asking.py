"""What a client of a split model may ask its server, and the questions themselves.

Legend: C = 1, B rows, N tokens of all rows, H width, P trained tensors of one side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.expected import ANY, Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.tree import Tree

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
    """

    group: str
    rows: int
    most: int
    width: int
    dtype: torch.dtype = torch.float32

    def expected(self, *names: str, squares: int = 0, optional: bool = False) -> Expected:
        """A question with these tensors, or with some of them; and how many squares there are."""
        flat = TensorSpec((ANY, self.width), self.dtype)
        specs = {HIDDEN: flat, GRADIENT: flat, LENGTH: TensorSpec((self.rows,), torch.int32)}
        specs[SQUARES] = TensorSpec((squares,))
        return Expected(
            group=self.group,
            tensors={name: specs[name] for name in names},
            weight=(0.0, 0.0),
            numbers=len(names) * (self.rows * self.most * self.width + self.rows) + squares,
            optional=frozenset(names) if optional else frozenset(),
        )

    def question(self, job: Job, clients: Sequence[int], **tensors: Tensor) -> Message:
        """What is asked, with tensors ``(1, ...)``."""
        return Message(
            group=self.group,
            client_C=torch.tensor(clients, dtype=torch.int64),
            version_C=torch.full((len(clients),), job.version, dtype=torch.int64),
            tensors=tensors,
            weight_C=torch.zeros(len(clients), dtype=torch.float64),
        )


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
