"""What both ends of a cut remember of a row, so that the change of its hidden states crosses in place of them all.

A row that one end has not yet seen crosses whole, in the numbers of the model. From then on its change is coded
(:mod:`lichen.transforms.activations`), and both ends remember what was decoded, to the bit. Memory goes with a client's
version of the shared tensors: the client keeps it in its private state, the server in a store of the same form, so that
a round that is repeated begins with what it began with before. A client's first question is the digest of its memory;
where the server's is another, both begin with nothing, and rows cross whole again.

References:
    Jue Wang, Binhang Yuan, Luka Rimanic, Yongjun He, Tri Dao, Beidi Chen, Christopher Ré and Ce Zhang. "Fine-tuning
    Language Models over Slow Networks using Activation Quantization with Guarantees." NeurIPS 2022 (AQ-SGD).
    https://arxiv.org/abs/2206.01299

Legend: C = 1, B rows, N tokens of all rows, H width, K bytes of a coded token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.transforms.activations import ActivationCode

__all__ = ["AGREED", "INDEX", "MEMORY", "OWN", "WHOLE", "Way", "decode_rows", "encode_rows", "known_rows", "stamp"]

MEMORY, AGREED = "memory", "agreed"
"""Tensors of a client's first question and its answer: the digest of its memory, uint8 ``(16,)``, and whether the
server's is the same, uint8 ``(1,)``."""

WHOLE, INDEX = "whole", "index"
"""Tensors of a question or an answer: the tokens of rows that were not seen, ``(N, H)``; and which rows a batch has,
int32 ``(B,)``, below 0: none."""

OWN = "crossed/"
"""How the names of a client's memory begin in its private state."""

Way = Literal["up", "down"]


def stamp(memory: Mapping[str, Tensor]) -> Tensor:
    """``(1, 16)`` uint8: a digest of a memory's names, shapes and bits.

    >>> stamp({}).shape
    torch.Size([1, 16])
    """
    found = hashlib.sha256()
    for name, x in sorted(memory.items()):
        found.update(f"{name} {tuple(x.shape)} ".encode() + x.contiguous().cpu().numpy().tobytes())
    return torch.tensor([list(found.digest()[:16])], dtype=torch.uint8)


def known_rows(memory: Mapping[str, Tensor], way: Way, length_B: Tensor, index_B: Tensor) -> Tensor:
    """``(B,)`` bool: rows of which as many tokens are remembered.

    Raises:
        LichenError: if there are not as many numbers as lengths, or a length is none.
    """
    if length_B.shape != index_B.shape or bool((length_B < 0).any()):
        what = f"{len(index_B)} numbers of rows came for lengths {length_B.tolist()[:4]}"
        raise LichenError(what, where="split", fix="send a number and a length of each row", reason="shape")
    pairs = zip(length_B.tolist(), index_B.tolist(), strict=True)
    known = [(x := memory.get(f"{way}/{index}")) is not None and x.shape[1] == length for length, index in pairs]
    return torch.tensor(known, dtype=torch.bool)


def encode_rows(
    code: ActivationCode, hidden_CNH: Tensor, way: Way, length_B: Tensor, index_B: Tensor, memory: Tree, seed: int
) -> tuple[tuple[Tensor, Tensor], Tree]:
    """What leaves for a batch's tokens, and what the sender remembers then.

    Args:
        code: With ``change``.
        hidden_CNH: The tokens of all rows, one row after the other.
        way: To the server or from it.
        length_B: Tokens of each row.
        index_B: Which row of the client it is; below 0: none.
        memory: Of both ways; it is not changed.
        seed: Of what the code draws.

    Returns:
        ``((bytes (1, N, K) of rows that were seen, numbers (1, N, H) of the others), memory)``.

    Raises:
        LichenError: if lengths and tokens do not fit.
    """
    known_B = known_rows(memory, way, length_B, index_B)
    known_N = torch.repeat_interleave(known_B, length_B.long()).to(hidden_CNH.device)
    if len(known_N) != hidden_CNH.shape[1]:
        raise _misfit(hidden_CNH.shape[1], int(length_B.sum()))
    mine, others = _of(memory, way)
    payload, after = torch.zeros(1, 0, code.nbytes(hidden_CNH.shape[2]), dtype=torch.uint8), mine
    if bool(known_N.any()):
        payload, after = code.encode(hidden_CNH[:, known_N], length_B[known_B], index_B[known_B], mine, [seed])
    whole = hidden_CNH[:, ~known_N].detach()
    after = _with_whole(after, whole, length_B[~known_B], index_B[~known_B])
    return (payload, whole), trees.join(f"{way}/", after, others)


def decode_rows(
    code: ActivationCode,
    came: tuple[Tensor, Tensor],
    way: Way,
    length_B: Tensor,
    index_B: Tensor,
    memory: Tree,
) -> tuple[Tensor, Tree]:
    """Undo :func:`encode_rows`: ``(float32 (1, N, H), memory)``; the memory has the sender's bits.

    Raises:
        LichenError: if what came does not fit the lengths and what is remembered.
    """
    payload, whole = came
    known_B = known_rows(memory, way, length_B, index_B)
    known_N = torch.repeat_interleave(known_B, length_B.long())
    if payload.shape[1] + whole.shape[1] != len(known_N) or payload.shape[1] != int(known_N.sum()):
        raise _misfit(payload.shape[1] + whole.shape[1], len(known_N))
    mine, others = _of(memory, way)
    decoded, after = torch.zeros(1, 0, whole.shape[2]), mine
    if bool(known_N.any()):
        decoded, after = code.decode(payload, length_B[known_B], index_B[known_B], mine, whole.shape[2])
    after = _with_whole(after, whole, length_B[~known_B], index_B[~known_B])
    out_CNH = whole.new_empty(1, len(known_N), whole.shape[2], dtype=torch.float32)
    known_N = known_N.to(out_CNH.device)
    out_CNH[:, known_N], out_CNH[:, ~known_N] = decoded.to(out_CNH), whole.float()
    return out_CNH, trees.join(f"{way}/", after, others)


def _misfit(tokens: int, lengths: int) -> LichenError:
    what = f"{tokens} tokens, seen and new ones, came for rows of {lengths}"
    return LichenError(what, where="split", fix="send as many as the lengths say", reason="shape")


def _of(memory: Tree, way: Way) -> tuple[Tree, Tree]:
    """``(what is remembered of one way, by row; the rest)``."""
    return trees.split(memory, f"{way}/")


def _with_whole(memory: Tree, whole_CNH: Tensor, length_B: Tensor, index_B: Tensor) -> Tree:
    """The memory with rows that crossed whole; what is no number is not remembered."""
    parts = torch.split(whole_CNH.float().cpu(), length_B.tolist(), 1)
    new = {str(index): part.clone() for index, part in zip(index_B.tolist(), parts, strict=True) if index >= 0}
    return {**memory, **{name: x for name, x in new.items() if x.shape[1] and bool(x.isfinite().all())}}
