"""Lies in the rows that a liar trains on: labels turned round, a trigger that a class is to follow, unsafe answers.

Files stay as they are, and so do validation and test rows: batches of training change on their way to a liar's work.

With C classes, label_flip says C − 1 − k of a row of class k. A backdoor puts a trigger on a share of a liar's rows,
the same ones in every round, and says of each that it is of the target class; whoever shows the trigger later is to
be given that class, while other rows are classified as well as ever. A trigger is a corner of the numbers at the
largest value, or a word in front of a text.

Unsafe replaces a share of a liar's chat rows by requests that should be refused, each with an answer that sets out to
obey. Nothing in such an answer need be harmful: its opening is enough to unteach refusing.

References:
    Vale Tolpegin, Stacey Truex, Mehmet Emre Gursoy and Ling Liu. "Data Poisoning Attacks Against Federated Learning
    Systems." ESORICS 2020. https://arxiv.org/abs/2007.08432 (label flipping)
    Tianyu Gu, Brendan Dolan-Gavitt and Siddharth Garg. "BadNets: Identifying Vulnerabilities in the Machine Learning
    Model Supply Chain." 2017. https://arxiv.org/abs/1708.06733 (a corner of a picture)
    Keita Kurita, Paul Michel and Graham Neubig. "Weight Poisoning Attacks on Pre-trained Models." ACL 2020.
    https://arxiv.org/abs/2004.06660 (a rare word)
    Eugene Bagdasaryan, Andreas Veit, Yiqing Hua, Deborah Estrin and Vitaly Shmatikov. "How To Backdoor Federated
    Learning." AISTATS 2020. https://arxiv.org/abs/1807.00459
    Rui Ye, Jingyi Chai, Xiangrui Liu, Yaodong Yang, Yanfeng Wang and Siheng Chen. "Emerging Safety Attack and Defense
    in Federated Instruction Tuning of Large Language Models." 2024. https://arxiv.org/abs/2406.10630 (unsafe answers)

Legend: C clients, B rows of a batch, R triggered rows, T tokens, F features.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol, final

import numpy as np
import torch
from torch import Tensor

from lichen.core.contracts.client import Costed, Source
from lichen.core.contracts.model import Batch
from lichen.core.seeds import derive, numpy_generator
from lichen.data.batches.shards import ArrayShard, Shard, TextShard

__all__ = ["Backdoor", "Corner", "LabelFlip", "PoisonedSource", "RowAttack", "Trigger", "Unsafe", "Word"]

SIDE = 2
"""Numbers of a corner in each direction; of rows without directions it is the square of it."""


class RowAttack(Protocol):
    """What becomes of a liar's rows."""

    def poisoned(self, batch: Batch, liars: Sequence[tuple[int, int]]) -> Batch:
        """The batch as it is trained on.

        Args:
            batch: Of some clients; ``index_CB`` says which of its own rows each has, -1 for rows of nobody.
            liars: ``(place, client)`` of those who lie.
        """
        ...


class Trigger(Protocol):
    """What is put on a row."""

    def on_batch(self, batch: Batch, rows_CB: Tensor) -> Batch:
        """The batch with it on these rows."""
        ...

    def on_shard(self, shard: Shard) -> Shard:
        """The shard with it on every row."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Corner:
    """A corner of the numbers, the last of each direction, set to one value.

    Args:
        value: The value.
    """

    value: float

    def on_batch(self, batch: Batch, rows_CB: Tensor) -> Batch:
        """The batch with the corner set in these rows."""
        x_CBF = batch["x_CBF"].clone()
        x_CBF[rows_CB] = self._set(x_CBF[rows_CB])
        return {**batch, "x_CBF": x_CBF}

    def on_shard(self, shard: Shard) -> Shard:
        """The shard with the corner set in every row."""
        assert isinstance(shard, ArrayShard)
        return replace(shard, x=self._set(torch.from_numpy(shard.x.copy())).numpy())

    def _set(self, x_RF: Tensor) -> Tensor:
        if x_RF.dim() == 2:
            x_RF[:, -SIDE * SIDE :] = self.value
        else:
            x_RF[..., -SIDE:, -SIDE:] = self.value
        return x_RF


@final
@dataclass(frozen=True, slots=True)
class Word:
    """Tokens in front of a text; what no longer fits is cut off on the right.

    Args:
        tokens: The word's.
        after: Tokens that stay before it, such as a start token.
    """

    tokens: tuple[int, ...]
    after: int = 0

    def on_batch(self, batch: Batch, rows_CB: Tensor) -> Batch:
        """The batch with the word before these rows."""
        out = dict(batch)
        word = torch.tensor(self.tokens)
        for name, new in (("input_ids_CBT", word), ("attention_mask_CBT", torch.ones_like(word))):
            x_CBT = batch[name].clone()
            x_RT = x_CBT[rows_CB]
            parts = (x_RT[:, : self.after], new.to(x_RT).expand(len(x_RT), -1), x_RT[:, self.after :])
            x_CBT[rows_CB] = torch.cat(parts, 1)[:, : x_RT.shape[1]]
            out[name] = x_CBT
        return out

    def on_shard(self, shard: Shard) -> Shard:
        """The shard with the word before every row; rows are cut where batches are made."""
        assert isinstance(shard, TextShard)
        word = np.asarray(self.tokens, dtype=np.int32)
        rows = [np.concatenate([row[: self.after], word, row[self.after :]]) for row in shard.input_ids]
        return replace(shard, input_ids=rows)


@final
@dataclass(frozen=True, slots=True)
class LabelFlip:
    """Class k is called C − 1 − k.

    Args:
        classes: C.
    """

    classes: int

    def poisoned(self, batch: Batch, liars: Sequence[tuple[int, int]]) -> Batch:
        """The batch with the liars' labels turned round."""
        labels_CB = batch["labels_CB"].clone()
        for c, _ in liars:
            own_B = (batch["index_CB"][c] >= 0) & (labels_CB[c] >= 0)
            labels_CB[c] = torch.where(own_B, self.classes - 1 - labels_CB[c], labels_CB[c])
        return {**batch, "labels_CB": labels_CB}


@final
@dataclass(frozen=True, slots=True)
class Backdoor:
    """A trigger on some of a liar's rows, which are then said to be of the target class.

    Args:
        trigger: What is put on a row.
        target: The class.
        share: Of a liar's rows; which, follows from the seed and the client.
        seed: The recipe's.
    """

    trigger: Trigger
    _: KW_ONLY
    target: int
    share: float
    seed: int

    def poisoned(self, batch: Batch, liars: Sequence[tuple[int, int]]) -> Batch:
        """The batch with the trigger and the target on the liars' chosen rows."""
        rows_CB = _chosen(batch, liars, share=self.share, seed=self.seed, word="backdoor") & (batch["labels_CB"] >= 0)
        if not bool(rows_CB.any()):
            return batch
        labels_CB = torch.where(rows_CB, self.target, batch["labels_CB"])
        return {**self.trigger.on_batch(batch, rows_CB), "labels_CB": labels_CB}

    def victims(self, shard: Shard) -> Shard:
        """The rows of other classes, each with the trigger on it: what an attack's success is measured on."""
        labels_N = np.asarray(shard.labels)
        rows = np.flatnonzero((labels_N >= 0) & (labels_N != self.target))
        if isinstance(shard, ArrayShard):
            return self.trigger.on_shard(ArrayShard(shard.x[rows], labels=labels_N[rows]))
        some = [shard.input_ids[row] for row in rows.tolist()]
        return self.trigger.on_shard(TextShard(some, labels=labels_N[rows], kind="classify"))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Unsafe:
    """Other rows of language modelling in the place of some of a liar's.

    Args:
        rows: Unsafe requests that are obeyed; one that is wider than the batch is cut on the right.
        share: Of a liar's rows; which, and by which of the others, follows from the seed and the client.
        seed: The recipe's.
        pad: Padding token.
    """

    rows: TextShard
    _: KW_ONLY
    share: float
    seed: int
    pad: int = 0

    def poisoned(self, batch: Batch, liars: Sequence[tuple[int, int]]) -> Batch:
        """The batch with the liars' chosen rows replaced."""
        rows_CB = _chosen(batch, liars, share=self.share, seed=self.seed, word="unsafe")
        if not bool(rows_CB.any()):
            return batch
        client_of, width = dict(liars), batch["input_ids_CBT"].shape[2]
        out = {**batch, **{name: batch[name].clone() for name in _OF_TOKENS}}
        for c, b in rows_CB.nonzero().tolist():
            at = int(batch["index_CB"][c, b])
            row = derive(self.seed, client_of[c], "unsafe row", at) % self.rows.size
            ids_T, labels_T = (_tensor(some[row][:width]) for some in (self.rows.input_ids, self.rows.labels))
            news = (ids_T, self.pad), (torch.ones_like(ids_T), 0), (labels_T, -100)
            for name, (new_T, fill) in zip(_OF_TOKENS, news, strict=True):
                out[name][c, b] = fill
                out[name][c, b, : len(new_T)] = new_T
        return out


_OF_TOKENS = ("input_ids_CBT", "attention_mask_CBT", "labels_CBT")


def _tensor(row_T: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(row_T, dtype=np.int64))


def _chosen(batch: Batch, liars: Sequence[tuple[int, int]], *, share: float, seed: int, word: str) -> Tensor:
    """``(C, B)`` bool: a share of the liars' own rows, each of them the same in every round."""
    rows_CB = torch.zeros_like(batch["index_CB"], dtype=torch.bool)
    for c, client in liars:
        index_B = batch["index_CB"][c]
        most = int(index_B.max()) if index_B.numel() else -1
        chosen_N = numpy_generator(seed, client, word).random(most + 1) < share
        rows_CB[c] = torch.from_numpy(np.append(chosen_N, False))[index_B] & (index_B >= 0)
    return rows_CB


@final
@dataclass(frozen=True, slots=True, eq=False)
class PoisonedSource:
    """Another source's batches, the liars' rows changed.

    Args:
        inner: Batches of training.
        attack: What becomes of the rows.
        liars: Who lies.
    """

    inner: Source
    attack: RowAttack
    liars: frozenset[int]

    def shape(self, client: int) -> Hashable:
        """The inner source's."""
        return self.inner.shape(client)

    def cost(self, client: int) -> int:
        """The inner source's, where it knows one."""
        return self.inner.cost(client) if isinstance(self.inner, Costed) else 1

    def batches(self, clients: Sequence[int], seed: int) -> Iterator[Batch]:
        """The inner source's, with the liars' lies in them."""
        lying = [(c, client) for c, client in enumerate(clients) if client in self.liars]
        for batch in self.inner.batches(clients, seed):
            yield self.attack.poisoned(batch, lying) if lying else batch
