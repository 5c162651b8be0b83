"""Codes a client's message, with error feedback: a transform.

With error feedback a client adds what was lost to its next change, codes the sum, and keeps what that
loses: over many rounds the sum of what arrived follows the sum of what was meant, however coarse a single
message is. The memory is private state under ``wire/``, float32, one tensor for each shared one, staged by
version as all private state, so that a killed round leaves no trace, and an answer that did not count none
either: the client's next job says so, and its memory is that of its last answer that counted. So the sum of
what was decoded of the answers that counted, and the memory, is the sum of the changes that those answers
meant. Where a client failed or has weight 0, what it sends is not counted, and its memory stays as it was.

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
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.expected import Expected, TensorSpec
from lichen.core.message import Job, Message
from lichen.core.seeds import derive
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.declared import Need, Property
from lichen.transforms.codec import Chain
from lichen.transforms.codec_words import CODED_LACKS
from lichen.transforms.layout import Layout

__all__ = ["WIRE", "Coded"]

WIRE = "wire."
"""A message's coded row is called so, and by its layout's digest."""


@final
@dataclass(frozen=True, slots=True)
class Coded:
    """A message's tensors of real numbers in one coded row ``wire.<digest>``, decoded when it arrives.

    Other tensors go as they are. A client's randomness is ``derive(job.seed, client, "wire")``. Decoding is
    deterministic, so an aggregator's promises hold; but a coded row is no sum of others, so masks cannot lie over it.

    Args:
        chain: How tensors are coded.
        error_feedback: Remember what the code loses.
    """

    chain: Chain
    _: KW_ONLY
    error_feedback: bool = True

    @property
    def name(self) -> str:
        """Of its memory."""
        return "wire"

    @property
    def key(self) -> str:
        """The recipe's."""
        return "wire.up"

    @property
    def needs(self) -> tuple[Need, ...]:
        """Nothing."""
        return ()

    @property
    def lacks(self) -> frozenset[Property]:
        """Sums, as each message is looked at, if only to decode it."""
        return CODED_LACKS

    def declared(self, expected: Expected) -> Expected:
        """Tensors of real numbers in one row whose length follows from chain and layout."""
        layout = _layout(expected)
        if layout is None:
            return expected
        rest = {name: spec for name, spec in expected.tensors.items() if not spec.dtype.is_floating_point}
        coded = {WIRE + layout.digest: TensorSpec((self.chain.nbytes(layout),), torch.uint8)}
        return replace(expected, tensors={**rest, **coded})

    def on_client(self, message: Message, own_C: Tree, job: Job, clients: Sequence[int]) -> tuple[Message, Tree]:
        """The message, coded; and the memory, where there is one."""
        real_C = {name: x for name, x in message.tensors.items() if x.is_floating_point()}
        if not real_C:
            return message, own_C
        layout = Layout.of(real_C, stacked=True)
        x_CN = layout.flatten(real_C)
        lost_C = _memory(own_C, job, real_C, len(clients)) if self.error_feedback else {}
        finite_C1 = _finite_C(message, x_CN).unsqueeze(1)
        if self.error_feedback:
            before_CN = layout.flatten(lost_C).to(x_CN.device)
            x_CN = torch.where(finite_C1, x_CN + before_CN, x_CN)
        seeds_C = [derive(job.seed, client, "wire") for client in clients]
        wire_CB = self.chain.encode(x_CN, layout, seeds_C)
        if self.error_feedback:
            after_CN = torch.where(finite_C1, x_CN - self.chain.decode(wire_CB, layout), before_CN)
            lost_C = {**lost_C, **layout.by_name(after_CN)}
        rest = {name: x for name, x in message.tensors.items() if name not in real_C}
        return replace(message, tensors={**rest, WIRE + layout.digest: wire_CB}), lost_C

    @property
    def measures(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def on_arrival(self, message: Message, expected: Expected, state: Tree) -> Message:
        """The message as it was before it was coded, as far as the code goes.

        Raises:
            LichenError: if its row is coded for another layout, or is not of its length.
        """
        layout = _layout(expected)
        if layout is None:
            return message
        tensors = dict(message.tensors)
        row_CB = tensors.pop(WIRE + layout.digest, None)
        if row_CB is None:
            raise LichenError(
                f"brings {sorted(tensors)[:3]}, not a row of layout {layout.digest}",
                where="wire",
                fix="let clients and server run the same recipe",
            )
        return replace(message, tensors={**tensors, **layout.unflatten(self.chain.decode(row_CB, layout))})

    def on_total(
        self, change: Shared, state: Tree, arrived: Tree, *, clients: int, seed: int
    ) -> tuple[Shared, dict[str, float], Tree]:
        """The change as it is."""
        return change, {}, {}


def _layout(expected: Expected) -> Layout | None:
    """How the real numbers of a message lie in a row; None where it has none."""
    real = {name: spec for name, spec in expected.tensors.items() if spec.dtype.is_floating_point}
    return Layout(tuple((name, real[name].shape, real[name].dtype) for name in sorted(real))) if real else None


def _memory(own_C: Tree, job: Job, sent_C: Tree, count: int) -> Tree:
    """What was lost so far; zeros at the first time and for what has changed its shape.

    Names that this job does not send, but another may, are there too: clients stand side by side
    only where their private state has the same names.
    """
    trainable = job.shared.trainable
    shapes = {name: x.shape for name, x in trainable.items() if x.is_floating_point()}
    shapes |= {name: x.shape[1:] for name, x in sent_C.items()}
    device = next(iter(sent_C.values())).device
    out: Tree = {}
    for name, shape in shapes.items():
        known = own_C.get(name)
        fits = known is not None and known.shape == (count, *shape)
        out[name] = known if known is not None and fits else torch.zeros(count, *shape, device=device)
    return {**{name: x for name, x in own_C.items() if name not in out}, **out}


def _finite_C(message: Message, x_CN: Tensor) -> Tensor:
    """Whose message counts."""
    finite_C = x_CN.isfinite().all(1) & (message.weight_C.to(x_CN.device) > 0)
    if "failed" in message.metrics:
        finite_C = finite_C & (message.metrics["failed"].to(x_CN.device) == 0)
    return finite_C
