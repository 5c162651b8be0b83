"""Packs rows of many clients back to back, without padding.

A batch of chat rows padded to its widest is mostly padding. Here the tokens of all rows stand in one
line, sorted by client; attention (:mod:`lichen.models.packing.attention`) lets no row see another, and the
adapters (:mod:`lichen.models.packing.grouped`) know where each client's tokens begin. Every other layer works
on tokens alone and needs to know nothing.

A language model's row ends before the last token that has a label: what follows predicts nothing,
and nothing that is predicted sees it.

Legend: C clients, B rows, T tokens of a padded row, N tokens in all, S sequences (rows that are not empty).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError

__all__ = ["PACKED_ATTENTION", "Bucket", "Pack", "Packing", "pack_rows"]

PACKED_ATTENTION = "lichen_packed"
"""What our attention is called in transformers' registry."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Sequences of like length, to be padded to one.

    Attributes:
        sequences: Positions among the pack's sequences.
        width: Tokens of the longest.
        gather: ``(sequences * width,)`` token of every padded place; places past a row's end repeat its last.
        place: ``(tokens,)`` padded place of every token that is kept.
        token: ``(tokens,)`` which token that is.
        lengths: ``(sequences,)`` tokens of each.
        real: ``(sequences * width, 1)`` 1 where a padded place is a token, else 0.
        even: All are equally long, so that no place is padding.
    """

    sequences: int
    width: int
    gather: Tensor
    place: Tensor
    token: Tensor
    lengths: Tensor
    real: Tensor
    even: bool


@final
@dataclass(frozen=True, kw_only=True)
class Pack:
    """Where everything lies in one line of tokens.

    Attributes:
        lengths: Tokens of each sequence, in order.
        rows: Each sequence's row of the flattened ``(C * B)`` batch.
        client_offsets: Where each client's tokens begin, and the end; C + 1 numbers.
        flat_N: int64, each token's place in the flattened ``(C * B * T)`` batch.
        ids_N: int64 tokens.
        host_N: The same on the host.
        position_N: int64, each token's place in its row.
        at_R: int64, the tokens whose next token has a label; empty for classifiers.
        label_R: int64, those labels.
        labels: How many of them each client has.
        row_labels: How many of them each row of the flattened ``(C * B)`` batch has.
    """

    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    client_offsets: tuple[int, ...]
    flat_N: Tensor
    ids_N: Tensor
    host_N: Tensor
    position_N: Tensor
    at_R: Tensor
    label_R: Tensor
    labels: tuple[int, ...]
    row_labels: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all, N."""
        return self.client_offsets[-1]

    @cached_property
    def client_ends(self) -> Tensor:
        """int32 ``(C,)`` on the tokens' device: where each client's tokens end."""
        return torch.tensor(self.client_offsets[1:], dtype=torch.int32).to(self.flat_N.device, non_blocking=True)

    def spread(self, x_CF: Tensor) -> Tensor:
        """``(N, F)``: to every token its client's row."""
        ends_C = self.client_ends
        counts_C = ends_C.diff(prepend=ends_C.new_zeros(1))
        return x_CF.repeat_interleave(counts_C, dim=0, output_size=self.tokens)

    def only(self, sequences: Sequence[int]) -> Pack:
        """Some of the rows, as one client's and without labels."""
        lengths = tuple(self.lengths[s] for s in sequences)
        begins = [0, *accumulate(self.lengths)]
        at_N = torch.cat([torch.arange(begins[s], begins[s + 1]) for s in sequences]).to(self.ids_N.device)
        return replace(
            self,
            lengths=lengths,
            rows=tuple(self.rows[s] for s in sequences),
            client_offsets=(0, sum(lengths)),
            flat_N=self.flat_N[at_N],
            ids_N=self.ids_N[at_N],
            host_N=self.host_N[at_N.cpu()],
            position_N=self.position_N[at_N],
            at_R=self.at_R[:0],
            label_R=self.label_R[:0],
            labels=(0,),
            row_labels=(0,) * len(sequences),
        )

    @cached_property
    def row_N(self) -> Tensor:
        """int64 ``(N,)`` on the tokens' device: each token's row of the flattened ``(C * B)`` batch."""
        rows_S, lengths_S = torch.tensor(self.rows, dtype=torch.int64), torch.tensor(self.lengths, dtype=torch.int64)
        return rows_S.repeat_interleave(lengths_S, output_size=self.tokens).to(self.flat_N.device)

    @cached_property
    def sequence_offsets(self) -> Tensor:
        """int32 ``(S + 1,)`` on the tokens' device: where each sequence begins, and the end."""
        lengths_S = torch.tensor((0, *self.lengths), dtype=torch.int64)
        return lengths_S.cumsum(0).to(device=self.flat_N.device, dtype=torch.int32)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Sequences by length, longest first; a bucket holds none shorter than half of its longest."""
        begins = [0]
        for length in self.lengths:
            begins.append(begins[-1] + length)
        order = sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])
        groups: list[list[int]] = []
        for s in order:
            if groups and 2 * self.lengths[s] > self.lengths[groups[-1][0]]:
                groups[-1].append(s)
            else:
                groups.append([s])
        return tuple(_bucket(group, self.lengths, begins, self.flat_N.device) for group in groups)


def _bucket(group: list[int], lengths: tuple[int, ...], begins: list[int], device: torch.device) -> Bucket:
    width = lengths[group[0]]
    length_S = torch.tensor([lengths[s] for s in group])
    begin_S = torch.tensor([begins[s] for s in group])
    across_SL = torch.arange(width).expand(len(group), width)
    real_SL = across_SL < length_S[:, None]
    gather_SL = begin_S[:, None] + torch.minimum(across_SL, length_S[:, None] - 1)
    place = real_SL.flatten().nonzero()[:, 0]
    return Bucket(
        sequences=len(group),
        width=width,
        gather=gather_SL.flatten().to(device),
        place=place.to(device),
        token=gather_SL.flatten()[place].to(device),
        lengths=length_S.to(device),
        real=real_SL.flatten()[:, None].to(device),
        even=bool((length_S == width).all()),
    )


def pack_rows(batch: Batch, *, to_label: bool, device: torch.device) -> Pack:
    """Drop padding tokens, padding rows and inactive clients from a padded batch.

    Args:
        batch: With ``attention_mask_CBT``, whose rows attend to a number of tokens from the left.
        to_label: Rows end before their last labelled token, and rows without one are dropped, as is
            right for the loss of a causal model.
        device: Where the model is; the batch itself is best on the host.

    Raises:
        LichenError: if a row's attended tokens have holes or do not begin on its left.
    """
    # On the host, where lengths must be known anyway; the line of tokens then goes over once.
    host = {name: x.cpu() for name, x in batch.items()}
    mask_CBT = host["attention_mask_CBT"] != 0
    clients, rows, width = mask_CBT.shape
    length_CB = mask_CBT.sum(-1)
    across_T = torch.arange(width)
    if bool((mask_CBT != (across_T < length_CB[..., None])).any()):
        raise LichenError("a row's attended tokens are not its first ones", where="batch", fix="pad on the right")
    labelled_CBT = torch.zeros_like(mask_CBT)
    if to_label:
        labelled_CBT = (host["labels_CBT"] != -100) & mask_CBT & host["active_C"][:, None, None]
        labelled_CBT[:, :, 0] = False
        length_CB = (labelled_CBT * across_T).amax(-1)
    elif "index_CB" in host:
        real_CB = host["index_CB"] >= 0
        if "answer_CB" in host:
            real_CB = real_CB | (host["answer_CB"] >= 0)
        length_CB = length_CB * real_CB
    length_CB = length_CB * host["active_C"][:, None]
    flat_N = (across_T < length_CB[..., None]).flatten().nonzero()[:, 0]
    lengths: list[int] = length_CB.flatten().tolist()
    nonempty = [row for row, length in enumerate(lengths) if length]
    # A label is predicted by the token before it, whose place among the kept ones is counted here.
    place = torch.full((clients * rows * width,), -1)
    place[flat_N] = torch.arange(len(flat_N))
    target_R = labelled_CBT.flatten().nonzero()[:, 0]
    offsets = (0, *length_CB.sum(1).cumsum(0).tolist())
    ids_N = host["input_ids_CBT"].flatten()[flat_N]
    labels_CBT = host["labels_CBT"] if to_label else host["input_ids_CBT"]
    return Pack(
        lengths=tuple(lengths[row] for row in nonempty),
        rows=tuple(nonempty),
        client_offsets=offsets,
        flat_N=flat_N.to(device),
        ids_N=ids_N.to(device),
        host_N=ids_N,
        position_N=(flat_N % width).to(device),
        at_R=place[target_R - 1].to(device),
        label_R=labels_CBT.flatten()[target_R].to(device),
        labels=tuple(labelled_CBT.flatten(1).sum(1).tolist()),
        row_labels=tuple(labelled_CBT.sum(-1).flatten().tolist()),
    )


@final
class Packing:
    """What all layers of one wrapped model look at to know whether they are in a packed call, and in which.

    Attributes:
        current: The pack of the call in progress; None in a padded one.
        hidden: Hidden states ``(C * B, T, H)`` that stand for the base model's, where they are known.
        configs: The model's configurations, which name the attention to use.
        checkpointing: In the call in progress, layers keep their input only and compute the rest again on the way back.
        clients: How many are in the call.
        only: The one client whose tensors layers use, while they see what is all clients'; None: everyone's.
        second_CB: How much the second of two adapters side by side counts in each row, the first the rest; None: as
            much as its own numbers say.
    """

    def __init__(self) -> None:
        self.clients = 1
        self.only: int | None = None
        self.second_CB: Tensor | None = None
        self.current: Pack | None = None
        self.hidden: Tensor | None = None
        self.configs: tuple[Any, ...] = ()
        self.checkpointing = False

    def own(self, x_C: Tensor) -> Tensor:
        """The clients' tensor, or the part of the one whose turn it is."""
        return x_C if self.only is None or not x_C.numel() else x_C[self.only : self.only + 1]

    @contextmanager
    def alone(self, client: int) -> Iterator[None]:
        """Inside, layers use one client's tensors, on input that is no client's own."""
        self.only = client
        try:
            yield
        finally:
            self.only = None

    @contextmanager
    def weighing(self, second_CB: Tensor | None) -> Iterator[None]:
        """Inside, the second of two adapters counts so much in each row."""
        before, self.second_CB = self.second_CB, second_CB
        try:
            yield
        finally:
            self.second_CB = before

    def at_tokens(self, x_CB: Tensor, tokens: int) -> Tensor:
        """A number of each row where its tokens are: ``(N,)`` of packed ones, else ``(C, tokens)``."""
        if self.current is None:
            return x_CB.repeat_interleave(tokens // x_CB.shape[1], dim=1)
        return x_CB.flatten()[self.current.row_N]

    def at_rows(self, v_CF: Tensor, x: Tensor) -> Tensor:
        """Each client's vector where its rows of ``x`` ``(C*B, ..., F)`` are, to be added or multiplied."""
        v_CF = self.own(v_CF)
        if self.current is not None:
            return self.current.spread(v_CF).reshape(x.shape)
        clients, wide = v_CF.shape
        rows = v_CF[:, None].expand(clients, x.shape[0] // clients, wide)
        return rows.reshape(x.shape[0], *[1] * (x.dim() - 2), wide)

    @contextmanager
    def holding(self, pack: Pack | None, *, checkpointing: bool | None = None) -> Iterator[None]:
        """Inside, layers work on this pack, with attention to match; None: on padded rows."""
        before = self.current, self.checkpointing
        names = [config._attn_implementation for config in self.configs]
        self.current = pack
        self.checkpointing = self.checkpointing if checkpointing is None else checkpointing
        for config in self.configs if pack is not None else ():
            config._attn_implementation = PACKED_ATTENTION
        try:
            yield
        finally:
            self.current, self.checkpointing = before
            for config, name in zip(self.configs, names, strict=True):
                config._attn_implementation = name
