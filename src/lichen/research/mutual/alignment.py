"""Aligns two tokenisations of one text, and maps next-token logits from one to the other.

Research: no recipe and no public name reaches this module.

Tokens of both sides are paired by dynamic programming: of all ways through the two rows that go forward
and leave no token out, the one whose pairs lie least apart by edit distance. An answer is carried where one
token stands against one token and says the same (:class:`lichen.research.mutual.vocabulary.Translation`): there both
models were asked the same question. Its tokens are translated, those that meet in one token add their
probabilities, and what has no translation is left out. All other places get no answer.

References:
    Fanqi Wan, Xinting Huang, Deng Cai, Xiaojun Quan, Wei Bi and Shuming Shi. "Knowledge Fusion of Large
    Language Models." ICLR 2024. https://arxiv.org/abs/2401.10491 (token alignment by minimum edit distance)
    Tao Fan, Guoqiang Ma, Yan Kang, Hanlin Gu, Yuanfeng Song, Lixin Fan, Kai Chen and Qiang Yang. "FedMKT:
    Federated Mutual Knowledge Transfer for Large and Small Language Models." COLING 2025.
    https://arxiv.org/abs/2406.02224

Legend: C clients, N texts, R places (tokens with a label, text by text) of the hearer, S of the teller, k
answers kept of a place, A, B tokens of one text on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate
from typing import final

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.research.mutual.vocabulary import Translation, Vocabulary, edit_distances

__all__ = ["Bridge", "align", "partners"]


def align(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """The cheapest way through two rows of strings: pairs ``(place in a, place in b)``, forward, none left out.

    Among equally cheap ways it goes back from the end by both, else by the first, else by the second row.

    >>> align(["un", "kind", "ly"], ["unk", "ind", "ly"])
    [(0, 0), (1, 1), (2, 2)]
    >>> align(["the", " cats"], ["the", " cat", "s"])
    [(0, 0), (1, 1), (1, 2)]
    """
    if not a or not b:
        return []
    words_a, place_a = np.unique(np.array(a, dtype=object), return_inverse=True)
    words_b, place_b = np.unique(np.array(b, dtype=object), return_inverse=True)
    cost_AB = edit_distances(words_a.tolist(), words_b.tolist())[place_a][:, place_b].astype(np.int64)
    total_AB = _totals(cost_AB)
    i, j = len(a), len(b)
    path = []
    while True:
        path.append((i - 1, j - 1))
        if i == j == 1:
            return path[::-1]
        both, first, second = total_AB[i - 1, j - 1], total_AB[i - 1, j], total_AB[i, j - 1]
        if both <= first and both <= second:
            i, j = i - 1, j - 1
        elif first <= second:
            i -= 1
        else:
            j -= 1


def _totals(cost_AB: np.ndarray) -> np.ndarray:
    """``(A + 1, B + 1)``: cost of the cheapest way up to each pair, one diagonal after another."""
    rows, columns = cost_AB.shape
    total_AB = np.full((rows + 1, columns + 1), np.iinfo(np.int64).max // 4)
    total_AB[0, 0] = 0
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.minimum(np.minimum(total_AB[i - 1, j], total_AB[i, j - 1]), total_AB[i - 1, j - 1])
        total_AB[i, j] = cost_AB[i - 1, j - 1] + before
    return total_AB


def partners(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """For every string of ``b`` its partner's place in ``a``, -1 unless the two stand against each other alone.

    Where both rows spell the same text they are cut wherever both have a boundary, and aligned piece by piece:
    tokens over the same characters are then always partners.

    >>> partners(["the", " cats"], ["the", " cat", "s"]).tolist()
    [0, -1, -1]
    """
    found = np.full(len(b), -1, np.int64)
    for (a0, a1), (b0, b1) in _pieces(a, b):
        path = np.array(align(a[a0:a1], b[b0:b1]), np.int64).reshape(-1, 2)
        of_a, of_b = (np.bincount(path[:, side], minlength=size) for side, size in ((0, a1 - a0), (1, b1 - b0)))
        alone = path[(of_a[path[:, 0]] == 1) & (of_b[path[:, 1]] == 1)]
        found[b0 + alone[:, 1]] = a0 + alone[:, 0]
    return found


def _pieces(a: Sequence[str], b: Sequence[str]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Stretches of both rows between the characters at which both have a boundary; all in one, if the texts differ."""
    ends_a, ends_b = (list(accumulate(map(len, row))) for row in (a, b))
    if "".join(a) != "".join(b) or not all(a) or not all(b):
        yield (0, len(a)), (0, len(b))
        return
    place_a, place_b = ({end: i + 1 for i, end in enumerate(ends)} for ends in (ends_a, ends_b))
    a0 = b0 = 0
    for end in ends_a:
        if end in place_b:
            yield (a0, place_a[end]), (b0, place_b[end])
            a0, b0 = place_a[end], place_b[end]


@final
@dataclass(frozen=True, slots=True)
class Bridge:
    """Carries answers on known texts from a teller's vocabulary and places to a hearer's.

    Args:
        translation: From the teller's vocabulary to the hearer's.
        place_R: The teller's place for each of the hearer's, -1 where an answer does not carry; int64.
        sender_size: The teller's places, S.
    """

    translation: Translation
    _: KW_ONLY
    place_R: Tensor
    sender_size: int

    @classmethod
    def between(cls, translation: Translation, teller: Sequence[np.ndarray], hearer: Sequence[np.ndarray]) -> Bridge:
        """The bridge for these texts.

        Args:
            translation: From the teller's vocabulary to the hearer's.
            teller: The labelled tokens of each text as the teller has them.
            hearer: The same texts as the hearer has them.

        Raises:
            LichenError: if the numbers of texts differ.
        """
        if len(teller) != len(hearer):
            raise LichenError(
                f"{len(teller)} texts on one side, {len(hearer)} on the other",
                where="public texts",
                fix="give both models the same texts",
            )
        source, target = translation.source, translation.target
        positions, at = [], 0
        for a, b in zip(teller, hearer, strict=True):
            found = partners(source.read(a.tolist()), target.read(b.tolist()))
            if len(b):
                same = translation(np.where(found >= 0, a[found] if len(a) else -1, -1)) == b
                positions.append(np.where((found >= 0) & same, found + at, -1))
            at += len(a)
        place_R = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        return cls(translation, place_R=torch.from_numpy(place_R), sender_size=at)

    @classmethod
    def same(cls, vocabulary: Vocabulary, rows: Sequence[np.ndarray]) -> Bridge:
        """The bridge between models of one tokenizer: every answer carries as it is."""
        count = sum(len(row) for row in rows)
        return cls(Translation(vocabulary, vocabulary), place_R=torch.arange(count), sender_size=count)

    @property
    def share(self) -> float:
        """Share of the hearer's places that get an answer."""
        return float((self.place_R >= 0).double().mean()) if len(self.place_R) else 0.0

    def carry(self, index_CSk: Tensor, prob_CSk: Tensor) -> tuple[Tensor, Tensor]:
        """Answers at the hearer's places in its vocabulary.

        Args:
            index_CSk: The teller's tokens, -1 where there is none.
            prob_CSk: Their probabilities.

        Returns:
            ``(index_CRk, prob_CRk)``, likeliest first, -1 and 0 where there is nothing; int16 for
            vocabularies of up to 32768 tokens, else int32, and the dtype that came.

        Raises:
            LichenError: if there are not S places.
        """
        if index_CSk.shape[1] != self.sender_size or prob_CSk.shape != index_CSk.shape:
            raise LichenError(
                f"answers of shape {tuple(index_CSk.shape)} at {self.sender_size} places",
                where="message",
                fix="let everybody hold the same public texts",
            )
        index_CSk, prob_CSk = index_CSk.cpu(), prob_CSk.cpu()
        here_R = self.place_R >= 0
        from_R = self.place_R.clamp(min=0)
        translated = torch.from_numpy(self.translation(index_CSk.numpy())) if self.sender_size else index_CSk.long()
        index_CRk = translated.index_select(1, from_R).masked_fill(~here_R[:, None], -1)
        prob_CRk = prob_CSk.index_select(1, from_R).float().masked_fill(index_CRk < 0, 0)
        index_CRk, prob_CRk = _merged(index_CRk, prob_CRk)
        kind = torch.int16 if self.translation.target.size <= 1 << 15 else torch.int32
        return index_CRk.to(kind), prob_CRk.to(prob_CSk.dtype)


def _merged(index_CRk: Tensor, prob_CRk: Tensor) -> tuple[Tensor, Tensor]:
    """Every token once, with the sum of its probabilities, in falling order; equal ones as they stood."""
    k = index_CRk.shape[-1]
    summed, again = torch.zeros_like(prob_CRk), torch.zeros_like(index_CRk, dtype=torch.bool)
    # One place among k at a time: all pairs at once would hold k times the answers.
    for j in range(k):
        summed += prob_CRk[..., j : j + 1] * (index_CRk == index_CRk[..., j : j + 1])
        again[..., j + 1 :] |= index_CRk[..., j + 1 :] == index_CRk[..., j : j + 1]
    gone = again | (index_CRk < 0)
    prob_CRk, order = summed.masked_fill(gone, -1).sort(dim=-1, descending=True, stable=True)
    index_CRk = index_CRk.masked_fill(gone, -1).gather(-1, order)
    return index_CRk, prob_CRk.clamp(min=0)
