"""Compresses a client's message, with error feedback.

With error feedback a client adds what was lost to its next change, codes the sum, and keeps what that
loses: over many rounds the sum of what arrived follows the sum of what was meant, however coarse a single
message is. The memory is private state under ``wire/``, float32, one tensor for each shared one, staged by
version as all private state, so that a killed round leaves no trace. Where a client failed or has weight 0,
what it sends is not counted, and its memory stays as it was.

References:
    Frank Seide, Hao Fu, Jasha Droppo, Gang Li and Dong Yu. "1-Bit Stochastic Gradient Descent and its
    Application to Data-Parallel Distributed Training of Speech DNNs." Interspeech 2014.
    Sai Praneeth Karimireddy, Quentin Rebjock, Sebastian U. Stich and Martin Jaggi. "Error Feedback Fixes
    SignSGD and other Gradient Compression Schemes." ICML 2019. https://arxiv.org/abs/1901.09847

Legend: C clients, N numbers of one client's message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.contracts import Batch, ClientWork
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.parameters import split_shared
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.transforms.codec import Chain
from lichen.transforms.layout import Layout

__all__ = ["WIRE", "Compressed"]

WIRE = "wire."
"""A message's coded row is called so, and by its layout's digest."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedState:
    """The wrapped work's state, what was asked, and what former messages lost, by name, ``(C, ...)`` float32."""

    inner: Any
    job: Job
    clients: tuple[int, ...]
    lost_C: Tree


@final
@dataclass(frozen=True, slots=True)
class Compressed:
    """Any work, its message's tensors of real numbers in one coded row ``wire.<digest>``.

    Other tensors go as they are. A client's randomness is ``derive(job.seed, client, "wire")``.

    Args:
        inner: What is done.
        chain: How its tensors are coded.
        error_feedback: Remember what the code loses.
    """

    inner: ClientWork
    chain: Chain
    _: KW_ONLY
    error_feedback: bool = True

    def expected(self, job: Job) -> Expected:
        """The wrapped work's, its tensors of real numbers in one row whose length follows from chain and layout."""
        inner = self.inner.expected(job)
        real = {name: spec for name, spec in inner.tensors.items() if spec.dtype.is_floating_point}
        if not real:
            return inner
        layout = Layout(tuple((name, real[name].shape, real[name].dtype) for name in sorted(real)))
        rest = {name: spec for name, spec in inner.tensors.items() if name not in real}
        coded = {WIRE + layout.digest: TensorSpec((self.chain.nbytes(layout),), torch.uint8)}
        return replace(inner, tensors={**rest, **coded})

    def init(self, job: Job, clients: Sequence[int], own_C: Tree | None) -> CompressedState:
        """The wrapped work's beginning; it does not see the memory."""
        lost_C, own = trees.split(own_C or {}, "wire/")
        return CompressedState(
            inner=self.inner.init(job, clients, own or None), job=job, clients=tuple(clients), lost_C=lost_C
        )

    def step(self, state: CompressedState, batch: Batch) -> CompressedState:
        """The wrapped work's step."""
        return replace(state, inner=self.inner.step(state.inner, batch))

    def final(self, state: CompressedState) -> tuple[Message, Tree | None]:
        """The wrapped work's message, coded; and its private state, with the memory where there is one."""
        message, own_C = self.inner.final(state.inner)
        real_C = {name: x for name, x in message.tensors.items() if x.is_floating_point()}
        if not real_C:
            return message, _with(own_C, state.lost_C)
        layout = Layout.of(real_C, stacked=True)
        x_CN = layout.flatten(real_C)
        lost_C = self._memory(state, real_C) if self.error_feedback else {}
        finite_C1 = _finite_C(message, x_CN).unsqueeze(1)
        if self.error_feedback:
            before_CN = layout.flatten(lost_C).to(x_CN.device)
            x_CN = torch.where(finite_C1, x_CN + before_CN, x_CN)
        seeds_C = [derive(state.job.seed, client, "wire") for client in state.clients]
        wire_CB = self.chain.encode(x_CN, layout, seeds_C)
        if self.error_feedback:
            after_CN = torch.where(finite_C1, x_CN - self.chain.decode(wire_CB, layout), before_CN)
            lost_C = {**lost_C, **layout.by_name(after_CN)}
        rest = {name: x for name, x in message.tensors.items() if name not in real_C}
        return replace(message, tensors={**rest, WIRE + layout.digest: wire_CB}), _with(own_C, lost_C)

    def _memory(self, state: CompressedState, sent_C: Tree) -> Tree:
        """What was lost so far; zeros at the first time and for what has changed its shape.

        Names that this job does not send, but another may, are there too: clients stand side by side
        only where their private state has the same names.
        """
        trainable, _ = split_shared(state.job.shared)
        count = len(state.clients)
        shapes = {name: x.shape for name, x in trainable.items() if x.is_floating_point()}
        shapes |= {name: x.shape[1:] for name, x in sent_C.items()}
        device = next(iter(sent_C.values())).device
        out: Tree = {}
        for name, shape in shapes.items():
            known = state.lost_C.get(name)
            fits = known is not None and known.shape == (count, *shape)
            out[name] = known if known is not None and fits else torch.zeros(count, *shape, device=device)
        return {**{name: x for name, x in state.lost_C.items() if name not in out}, **out}


def _finite_C(message: Message, x_CN: Tensor) -> Tensor:
    """Whose message counts."""
    finite_C = x_CN.isfinite().all(1) & (message.weight_C.to(x_CN.device) > 0)
    if "failed" in message.metrics:
        finite_C = finite_C & (message.metrics["failed"].to(x_CN.device) == 0)
    return finite_C


def _with(own_C: Tree | None, lost_C: Tree) -> Tree | None:
    return trees.join("wire/", lost_C, own_C or {}) if lost_C else own_C
