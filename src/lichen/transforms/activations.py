"""Codes hidden states and their gradients where a model is cut: each token by itself, or as the change of its row.

A token's numbers are one vector of a chain of codecs (:mod:`lichen.transforms.codec`), so that no scale is shared
between tokens and every token takes equally many bytes, whoever stands beside it. With ``change`` a row that has been
sent before is sent as its difference from what the other side decoded last: both sides remember that, by row and to
the bit, so that what the code lost is part of the next difference (error feedback). A row whose states hardly move
between two visits is then known ever better, at the same bytes.

With noise, ``x + σ |x| z / √H`` is sent in place of ``x``, so that the noise is about σ times as long as the token's
vector. It follows from the seeds that are passed, and hides something only from who does not know them; it comes
with no guarantee.

Errors, with ``r`` what is sent, the state or its change: bf16 is off by at most ``2^-8 |r|`` a number; ``int8~`` and
``int4~`` by at most half a scale, ``(1 + 2^-7) max|r| / (2 L)`` of a block with ``L`` 127 or 7, and ``int8``, ``int4``
by less than a whole one; ``topk:k/n`` by at most ``√(1 - k/n) ‖r‖``. So with ``change`` and a row that stands still
the error falls by the code's own factor with every visit.

References:
    Jue Wang, Binhang Yuan, Luka Rimanic, Yongjun He, Tri Dao, Beidi Chen, Christopher Ré and Ce Zhang. "Fine-tuning
    Language Models over Slow Networks using Activation Quantization with Guarantees." NeurIPS 2022 (AQ-SGD).
    https://arxiv.org/abs/2206.01299

Legend: C clients, N tokens of all rows of one client, H width, K bytes of a token, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import derive, torch_generator
from lichen.core.tree import Tree
from lichen.transforms.codec import Chain
from lichen.transforms.codec_words import CHANGE
from lichen.transforms.layout import Layout
from lichen.transforms.parse import parse_codecs
from lichen.transforms.powersgd import PowerSGD
from lichen.transforms.quantize import Quantize

__all__ = ["ActivationCode", "noisy_tokens", "parse_activation_code"]


@final
@dataclass(frozen=True, slots=True)
class ActivationCode:
    """How the tokens of one crossing are coded; both sides hold the same.

    Args:
        chain: Of each token's numbers; an empty one sends float32.
        change: Send the change of a row since its last visit.

    Raises:
        LichenError: if the chain needs a matrix.

    >>> ActivationCode(parse_codecs(["int8"])).nbytes(576)
    586
    """

    chain: Chain
    _: KW_ONLY
    change: bool = False

    def __post_init__(self) -> None:
        if any(isinstance(codec, PowerSGD) for codec in self.chain.codecs):
            raise LichenError(
                "sketch codes matrices, and a token is a vector", where="split.code", fix="use bf16, int8, int4 or topk"
            )

    @property
    def first_sent(self) -> ActivationCode:
        """How a row crosses that was not seen: whole where changes are sent."""
        return ActivationCode(parse_codecs(())) if self.change else self

    def nbytes(self, width: int) -> int:
        """K: bytes of a token of H numbers."""
        return self.chain.nbytes(Layout.vector(width))

    def encode(
        self, hidden_CNH: Tensor, length_B: Tensor, index_B: Tensor, memory: Tree, seeds_C: Sequence[int]
    ) -> tuple[Tensor, Tree]:
        """What is sent, and what is remembered.

        Args:
            hidden_CNH: The tokens of all rows, one row after the other, without padding; of several clients only where
                nothing is remembered.
            length_B: Tokens of each row.
            index_B: Which row of the client it is; below 0: none.
            memory: What was decoded last of each row; empty at the beginning. It is not changed.
            seeds_C: One for each client; what is random of a token follows from it and from the token's place.

        Returns:
            ``(uint8 (C, N, K), memory)``.

        Raises:
            LichenError: if lengths and tokens do not fit, or changes of several clients are asked for at once.
        """
        self._check(hidden_CNH, length_B, index_B)
        clients, tokens, width = hidden_CNH.shape
        base_CNH = self._remembered(memory, length_B, index_B, width)
        sent_CNH = hidden_CNH.detach().float()
        sent_CNH = sent_CNH if base_CNH is None else sent_CNH - base_CNH.to(sent_CNH.device)
        seeds = [derive(seed, place, "token") for seed in seeds_C for place in range(tokens)] if self._draws else []
        rows_RH = sent_CNH.reshape(clients * tokens, width)
        payload = self.chain.encode(rows_RH, Layout.vector(width), seeds or [0] * len(rows_RH))
        payload = payload.reshape(clients, tokens, -1)
        if not self.change:
            return payload, memory
        _, memory = self.decode(payload, length_B, index_B, memory, width)
        return payload, memory

    def decode(
        self, payload_CNK: Tensor, length_B: Tensor, index_B: Tensor, memory: Tree, width: int
    ) -> tuple[Tensor, Tree]:
        """Undo :meth:`encode` as far as the code goes: ``(float32 (C, N, H), memory)``; its memory has equal bits.

        Raises:
            LichenError: if tokens do not have this code's bytes, or as :meth:`encode`.
        """
        if payload_CNK.dtype != torch.uint8 or payload_CNK.dim() != 3 or payload_CNK.shape[2] != self.nbytes(width):
            raise LichenError(
                f"{tuple(payload_CNK.shape)} {payload_CNK.dtype} are not {self.nbytes(width)} bytes a token",
                where="split.code",
                fix="let clients and server run the same recipe",
                reason="shape",
            )
        self._check(payload_CNK, length_B, index_B)
        clients, tokens, _ = payload_CNK.shape
        rows_RH = self.chain.decode(payload_CNK.reshape(clients * tokens, -1), Layout.vector(width))
        out_CNH = rows_RH.reshape(clients, tokens, width)
        base_CNH = self._remembered(memory, length_B, index_B, width)
        if base_CNH is not None:
            out_CNH = out_CNH + base_CNH.to(out_CNH.device)
        return out_CNH, self._remember(memory, out_CNH, length_B, index_B)

    @property
    def _draws(self) -> bool:
        return any(isinstance(codec, Quantize) and codec.stochastic for codec in self.chain.codecs)

    def _check(self, token_CN: Tensor, length_B: Tensor, index_B: Tensor) -> None:
        if token_CN.shape[1] != int(length_B.sum()) or len(length_B) != len(index_B):
            raise LichenError(
                f"{token_CN.shape[1]} tokens came for {len(index_B)} rows of {int(length_B.sum())}",
                where="split",
                fix="send as many as the lengths say",
                reason="shape",
            )
        if self.change and len(token_CN) != 1:
            raise LichenError(f"{len(token_CN)} clients have no rows in common", where="split.code", fix="one a call")

    def _remembered(self, memory: Tree, length_B: Tensor, index_B: Tensor, width: int) -> Tensor | None:
        """``(1, N, H)``: what both sides know of these rows; zeros of one that is new or has another length."""
        if not self.change:
            return None
        parts = []
        for length, index in zip(length_B.tolist(), index_B.tolist(), strict=True):
            known = memory.get(str(index))
            fits = known is not None and known.shape == (1, length, width)
            parts.append(known if known is not None and fits else torch.zeros(1, length, width))
        return torch.cat([torch.zeros(1, 0, width), *(part.cpu() for part in parts)], 1)

    def _remember(self, memory: Tree, out_CNH: Tensor, length_B: Tensor, index_B: Tensor) -> Tree:
        """The memory after these rows; the last of two equal rows of a batch counts, and what is no number does not."""
        if not self.change:
            return memory
        parts = torch.split(out_CNH.detach().cpu(), length_B.tolist(), 1)
        new = {str(index): part.clone() for index, part in zip(index_B.tolist(), parts, strict=True) if index >= 0}
        return {**memory, **{name: x for name, x in new.items() if bool(x.isfinite().all())}}


def parse_activation_code(words: Sequence[str]) -> ActivationCode:
    """A code by its words, such as ``change, int4``.

    Raises:
        LichenError: if a word is unknown, ``change`` stands elsewhere than first or alone, or the chain needs a matrix.

    >>> parse_activation_code(["change", "int8"]).change
    True
    """
    words = list(words)
    change = words[:1] == [CHANGE]
    rest = words[1:] if change else words
    if CHANGE in rest or (change and not rest):
        raise LichenError(
            f"{CHANGE} stands first and says what is coded by the words after it",
            where="split.code",
            fix=f"write for example: {CHANGE}, int8",
        )
    try:
        return ActivationCode(parse_codecs(rest), change=change)
    except LichenError as error:
        raise LichenError(error.what, where="split.code", fix=error.fix) from None


def noisy_tokens(hidden_CNH: Tensor, noise: float, seeds_C: Sequence[int]) -> Tensor:
    """Tokens with Gaussian noise about ``noise`` times as long as each token's vector; as they are where it is 0.

    Args:
        hidden_CNH: The tokens.
        noise: σ, relative to a token's norm.
        seeds_C: One for each client.

    Raises:
        LichenError: if the noise is negative or no number.
    """
    if not 0 <= noise < float("inf"):
        raise LichenError(f"noise of {noise} is not possible", where="split.noise", fix="use 0 or more")
    if not noise:
        return hidden_CNH
    shape = hidden_CNH.shape[1:]
    z_CNH = torch.stack([torch.randn(shape, generator=torch_generator(seed, "split noise")) for seed in seeds_C])
    norm_CN1 = torch.linalg.vector_norm(hidden_CNH.detach().float(), dim=-1, keepdim=True)
    relative = noise / math.sqrt(max(shape[-1], 1))
    away_CNH: Tensor = (z_CNH.to(norm_CN1.device) * relative * norm_CN1).to(hidden_CNH.dtype)
    return hidden_CNH + away_CNH
