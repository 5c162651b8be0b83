"""Weak and strong augmentation of texts: words dropped, masked or replaced.

A method that learns from rows without labels asks a model about a row that is hardly changed (weak) and
teaches it to say the same of the row when it is changed a lot (strong). Text is changed on its token ids,
so that a client work can do it batch by batch: words are drawn by EDA's rules (deletion, exchange) and by
masking and the removal of a span, as in the noised inputs of UDA; special tokens stay, and what is left
moves together, with padding behind it. Pictures are the matter of :mod:`lichen.data.batches.augment_images`.

What happens to a row follows from ``(seed, client, row, step)`` alone: numbers come from a counter
(SplitMix64), so that neither the batch a row came in nor the width it was padded to has a say. Rows that
are not the client's own (``index_CB`` = -1) stay as they are.

References:
    Jason Wei and Kai Zou. "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text
    Classification Tasks." EMNLP-IJCNLP 2019. https://arxiv.org/abs/1901.11196
    Qizhe Xie, Zihang Dai, Eduard Hovy, Minh-Thang Luong and Quoc V. Le. "Unsupervised Data Augmentation
    for Consistency Training." NeurIPS 2020. https://arxiv.org/abs/1904.12848
    Guy L. Steele Jr., Doug Lea and Christine H. Flood. "Fast Splittable Pseudorandom Number Generators."
    OOPSLA 2014. https://doi.org/10.1145/2660193.2660195 (SplitMix64)

Legend: C clients, B rows of a batch, N = C * B, T tokens, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, Protocol, final

import numpy as np
import torch

from lichen.core.contracts.client import Source
from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.seeds import derive

__all__ = ["Draw", "Kind", "TextViews", "Views", "WeaklyViewed", "Words", "check_shares", "draws", "uniform"]

Kind = Literal["weak", "strong"]

Draw = Callable[[str, int], np.ndarray]
"""``(purpose, D)`` to uniform numbers ``(N, D)``."""

_GOLDEN, _ONE, _TWO = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _ONE
    x = (x ^ (x >> np.uint64(27))) * _TWO
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def uniform(key: int, row_B: np.ndarray, step: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 ``(B, count)``: each follows from key, row, step and place alone.

    >>> a, b = uniform(7, np.array([3, 5]), 0, 4), uniform(7, np.array([5]), 0, 2)
    >>> bool((a[1, :2] == b[0]).all()), bool((a[0] == a[1]).any())
    (True, False)
    """
    begin_B = _mix(np.asarray(row_B).astype(np.uint64) * _GOLDEN + np.array([key], dtype=np.uint64))
    begin_B = _mix(begin_B + np.array([step + 1], dtype=np.uint64) * _GOLDEN)
    raw_BD = _mix(begin_B[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    uniform_BD: np.ndarray = (raw_BD >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform_BD


def draws(batch: Batch, kind: Kind, *, seed: int, clients: Sequence[int], step: int) -> Draw:
    """Where a view's numbers come from: every purpose has its own for every row."""
    index_CB = batch["index_CB"].cpu().numpy()

    def draw(purpose: str, count: int) -> np.ndarray:
        keys = [derive(seed, client, "view", kind, purpose) for client in clients]
        return np.concatenate([uniform(key, row_B, step, count) for key, row_B in zip(keys, index_CB, strict=True)])

    return draw


class Views(Protocol):
    """What makes weak and strong views of a batch."""

    def view(self, batch: Batch, kind: Kind, *, seed: int, clients: Sequence[int], step: int) -> Batch:
        """The batch with its own rows' inputs changed; labels, indices and all else as they were.

        Args:
            batch: One step of C clients.
            kind: How much.
            seed: Of the round.
            clients: Roster indices of the C clients.
            step: Number of the step.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class WeaklyViewed:
    """A source whose rows are seen in a weak view.

    Args:
        inner: Whose batches.
        views: Makes the views.
    """

    inner: Source
    views: Views

    def shape(self, client: int) -> Hashable:
        """The inner source's."""
        return self.inner.shape(client)

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The inner source's, in their views."""
        for step, batch in enumerate(self.inner.batches(clients, seed)):
            yield self.views.view(batch, "weak", seed=seed, clients=clients, step=step)


def check_shares(where: str, **shares: float) -> None:
    """Refuse what is no share.

    Raises:
        LichenError: naming the first that is below 0, or 1 and more.
    """
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise LichenError(f"{share} is no share", where=f"{where}.{name}", fix="use 0 or more, and less than 1")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """How token rows are changed; by default not at all.

    Args:
        drop: Chance of each word to be left out; the last one stays.
        mask: Chance of each word to become the mask token.
        swap: Share of the words that change places with another, in pairs.
        crop: Share of the words that go in one span.

    Raises:
        LichenError: if a value is no share.
    """

    drop: float = 0.0
    mask: float = 0.0
    swap: float = 0.0
    crop: float = 0.0

    def __post_init__(self) -> None:
        check_shares("augment.words", drop=self.drop, mask=self.mask, swap=self.swap, crop=self.crop)


@final
@dataclass(frozen=True, slots=True)
class TextViews:
    """Views of token rows.

    Args:
        pad: The padding token.
        special: Tokens that stay where they are.
        mask: The mask token; None where there is none.
        weak: By default rows as they are.
        strong: By default a fifth left out one by one, a fifth in one span, and a tenth exchanged.

    Raises:
        LichenError: if words are to be masked and there is no mask token.
    """

    pad: int
    _: KW_ONLY
    special: tuple[int, ...] = ()
    mask: int | None = None
    weak: Words = field(default_factory=Words)
    strong: Words = field(default_factory=lambda: Words(drop=0.2, swap=0.1, crop=0.2))

    def __post_init__(self) -> None:
        if self.mask is None and (self.weak.mask or self.strong.mask):
            raise LichenError("there is no mask token", where="augment.words.mask", fix="set it to 0, raise drop")

    @classmethod
    def of(cls, tokenizer: Any, *, weak: Words | None = None, strong: Words | None = None) -> TextViews:
        """For a tokenizer: its special tokens stay; where it has no mask token, words to mask are left out instead."""
        from lichen.data.batches.text import pad_id

        unknown, mask = tokenizer.unk_token_id, getattr(tokenizer, "mask_token_id", None)
        stays = {int(t) for t in tokenizer.all_special_ids} - {unknown, mask}
        chosen = [weak or Words(), strong or Words(drop=0.1, mask=0.1, swap=0.1, crop=0.2)]
        if mask is None:
            chosen = [replace(w, drop=w.drop + (1 - w.drop) * w.mask, mask=0.0) for w in chosen]
        return cls(pad_id(tokenizer), special=tuple(sorted(stays)), mask=mask, weak=chosen[0], strong=chosen[1])

    def view(self, batch: Batch, kind: Kind, *, seed: int, clients: Sequence[int], step: int) -> Batch:
        """As :meth:`Views.view`, on ``input_ids_CBT`` and ``attention_mask_CBT``.

        Raises:
            LichenError: if every token has a label of its own.
        """
        if "labels_CBT" in batch:
            raise LichenError("tokens that have labels cannot be moved", where="augment.words", fix="use a classifier")
        words = self.weak if kind == "weak" else self.strong
        if words == Words():
            return batch
        shape = batch["input_ids_CBT"].shape
        before = [batch[name].flatten(0, 1).cpu().numpy() for name in ("input_ids_CBT", "attention_mask_CBT")]
        draw = draws(batch, kind, seed=seed, clients=clients, step=step)
        after = self._changed(before[0], before[1], words, draw)
        mine_N1 = (batch["index_CB"].flatten() >= 0).cpu().numpy()[:, None]
        ids, mask = (
            torch.from_numpy(np.where(mine_N1, new, old)).view(shape) for new, old in zip(after, before, strict=True)
        )
        return {**batch, "input_ids_CBT": ids, "attention_mask_CBT": mask}

    def _changed(
        self, ids_NT: np.ndarray, mask_NT: np.ndarray, words: Words, draw: Draw
    ) -> tuple[np.ndarray, np.ndarray]:
        ids_NT, (rows, width) = ids_NT.copy(), ids_NT.shape
        seen_NT = mask_NT > 0
        word_NT = seen_NT & ~np.isin(ids_NT, (self.pad, *self.special))
        length_N = word_NT.sum(1)
        if words.swap:
            pairs_N = np.floor(words.swap * length_N / 2 + 0.5).astype(np.int64) * (length_N > 1)
            place_NT = np.argsort(~word_NT, axis=1, kind="stable")
            most = int(pairs_N.max(initial=0))
            uniform_ND = draw("swap", 2 * most)
            for pair in range(most):
                n = np.flatnonzero(pairs_N > pair)
                i, j = (place_NT[n, np.floor(uniform_ND[n, 2 * pair + k] * length_N[n]).astype(int)] for k in (0, 1))
                ids_NT[n, i], ids_NT[n, j] = ids_NT[n, j], ids_NT[n, i]
        if words.mask and self.mask is not None:
            ids_NT[word_NT & (draw("mask", width) < words.mask)] = self.mask
        gone_NT = np.zeros((rows, width), bool)
        if words.crop:
            span_N1 = np.floor(words.crop * length_N).astype(np.int64)[:, None]
            first_N1 = np.floor(draw("crop", 1) * (length_N[:, None] - span_N1 + 1)).astype(np.int64)
            nth_NT = word_NT.cumsum(1) - 1
            gone_NT |= word_NT & (nth_NT >= first_N1) & (nth_NT < first_N1 + span_N1)
        if words.drop:
            uniform_NT = draw("drop", width)
            stays_NT = word_NT & ~gone_NT & (uniform_NT >= words.drop)
            last_N = np.where(word_NT & ~gone_NT, uniform_NT, -1.0).argmax(1)
            stays_NT[np.arange(rows), last_N] |= word_NT[np.arange(rows), last_N]
            gone_NT = word_NT & ~stays_NT
        remaining_NT = seen_NT & ~gone_NT
        order_NT = np.argsort(~remaining_NT, axis=1, kind="stable")
        left_NT = np.arange(width) < remaining_NT.sum(1)[:, None]
        return np.where(left_NT, np.take_along_axis(ids_NT, order_NT, 1), self.pad), left_NT.astype(mask_NT.dtype)
