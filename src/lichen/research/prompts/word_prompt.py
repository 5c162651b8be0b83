"""A discrete prompt of words, for endpoints that take text alone.

Research: no recipe and no public name reaches this module.

What is shared is a distribution: for each position of the prompt the probabilities of the candidates.
To every work and evaluation this is a cohort model whose one trainable tensor is ``choice``; its loss is
that of the likeliest prompt. Rows come as ordinary token rows of any source and are read back
into text: :func:`decode_bytes` reads rows whose tokens are the bytes of UTF-8 (:func:`encode_bytes`), so that
a client needs no tokenizer at all.

References:
    Mingkai Deng, Jianyu Wang, Cheng-Ping Hsieh, Yihan Wang, Han Guo, Tianmin Shu, Meng Song, Eric P. Xing
    and Zhiting Hu. "RLPrompt: Optimizing Discrete Text Prompts with Reinforcement Learning." EMNLP 2022.
    https://arxiv.org/abs/2205.12548 (prompts of single words, chosen by reward alone).

Legend: C clients, B rows, T tokens, K classes, L positions, V candidates of a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from lichen.core.contracts.model import Batch, Objective
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.fm.interface import Scorer, token_rows
from lichen.models.client_axis import row_by_row
from lichen.models.objectives import Classification, NextToken

__all__ = ["WordPrompt", "decode_bytes", "encode_bytes"]


def encode_bytes(text: str) -> np.ndarray:
    """A text as a token row, one token a byte of its UTF-8; int32.

    >>> decode_bytes(encode_bytes("café").tolist())
    'café'
    """
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode_bytes(tokens: Sequence[int]) -> str:
    """Undo :func:`encode_bytes`; a character that was cut through is left out."""
    return bytes(tokens).decode(errors="ignore")


@final
class WordPrompt:
    """A prompt of L words as a cohort model; clients are gone through one by one.

    Args:
        fm: Whom to ask.
        candidates: V words or phrases; an empty one stands for no word.
        length: L.
        words: One continuation a class, as it follows the filled template; none: rows carry their
            own continuation, the labelled tokens.
        template: Holds ``{prompt}`` and ``{text}``, and ends where the answer begins.
        decode: Token rows to text.

    Raises:
        LichenError: if the template lacks a place, or there is nothing to choose between.
    """

    reference = True

    def __init__(
        self,
        fm: Scorer,
        *,
        candidates: Sequence[str],
        length: int,
        words: Sequence[str] = (),
        template: str = "{prompt}\n{text}",
        decode: Callable[[Sequence[int]], str] = decode_bytes,
    ) -> None:
        if template.count("{prompt}") != 1 or template.count("{text}") != 1:
            raise LichenError("lacks a place", where="template", fix="write {prompt} and {text} once each")
        if len(set(candidates)) != len(candidates) or len(candidates) < 2 or length < 1 or len(words) == 1:
            raise LichenError(
                "nothing to choose between", where="candidates", fix="give 2 or more different words, length 1 or more"
            )
        self.fm, self.candidates, self.length = fm, tuple(candidates), length
        self.words, self.template, self.decode = tuple(words), template, decode
        self.name, self.base = f"{fm.name}+words", ""
        self.group = f"words/{length}x{len(candidates)}"
        self.objective: Objective = Classification(len(words)) if words else NextToken()
        self.classes = self.objective.classes

    def init(self, seed: int) -> Tree:
        """Every candidate as likely as any other."""
        del seed
        return {"choice": torch.full((self.length, len(self.candidates)), 1 / len(self.candidates))}

    def prompt(self, choice_LV: Tensor) -> str:
        """The likeliest prompt; the earlier of equally likely candidates."""
        words = [self.candidates[v] for v in _first_of_most(choice_LV)]
        return " ".join(word for word in words if word)

    def loss(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_C, count_C)`` float64: cross entropy among the words, or of the continuations; and labelled rows or
        tokens."""
        del fixed
        found = []
        for c, active in enumerate(batch["active_C"].tolist()):
            if not active:
                found.append((0.0, 0))
                continue
            prompt = self.prompt(trainable_C["choice"][c])
            found.append(self._chosen(prompt, batch, c) if self.words else self._written(prompt, batch, c))
        return torch.tensor([x for x, _ in found], dtype=torch.float64), torch.tensor([n for _, n in found])

    def losses(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        """``(loss_CB, count_CB)``, one row at a time."""
        return row_by_row(self.loss, trainable_C, fixed, batch)

    def logits(self, trainable_C: Tree, fixed: Tree, batch: Batch) -> Tensor:
        """``logits_CBK`` float64: log-probabilities among the words; zeros for padding rows and inactive clients.

        Raises:
            LichenError: where there are no words.
        """
        del fixed
        if self.classes is None:
            raise LichenError("has no classes", where="prompt of words", fix="give it words")
        out_CBK = torch.zeros(*batch["input_ids_CBT"].shape[:2], self.classes, dtype=torch.float64)
        for c in (c for c, on in enumerate(batch["active_C"].tolist()) if on):
            rows = token_rows(batch, c)
            indices = [b for b, _ in rows]
            out_CBK[c, indices] = self._ask(self.prompt(trainable_C["choice"][c]), [row for _, row in rows])
        return out_CBK

    def filled(self, prompt: str, text: str) -> str:
        """The template with both in it; a template whose prompt is empty does not begin with space."""
        # Cut before anything is put in: a text may hold braces of its own.
        head, tail = self.template.split("{text}")
        return head.replace("{prompt}", prompt).lstrip() + text + tail.replace("{prompt}", prompt)

    def _ask(self, prompt: str, rows: Sequence[Sequence[int]]) -> Tensor:
        queries = [self.filled(prompt, self.decode(row)) for row in rows]
        return torch.log_softmax(self.fm.score(queries, [self.words] * len(queries)), -1)

    def _chosen(self, prompt: str, batch: Batch, c: int) -> tuple[float, int]:
        rows = [(int(batch["labels_CB"][c, b]), row) for b, row in token_rows(batch, c)]
        rows = [(label, row) for label, row in rows if label >= 0]
        if not rows:
            return 0.0, 0
        logp_BK = self._ask(prompt, [row for _, row in rows])
        return -float(logp_BK[torch.arange(len(rows)), [label for label, _ in rows]].sum()), len(rows)

    def _written(self, prompt: str, batch: Batch, c: int) -> tuple[float, int]:
        queries, texts, count = [], [], 0
        for b, row in token_rows(batch, c):
            learned = [t for t in range(len(row)) if int(batch["labels_CBT"][c, b, t]) >= 0]
            if learned:
                queries.append(self.filled(prompt, self.decode(row[: learned[0]])))
                texts.append((self.decode(row[learned[0] : learned[-1] + 1]),))
                count += len(learned)
        return (-float(self.fm.score(queries, texts).sum()) if queries else 0.0), count


def _first_of_most(choice_LV: Tensor) -> list[int]:
    return [row.index(max(row)) for row in choice_LV.tolist()]
