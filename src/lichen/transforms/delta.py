"""Encodes the difference between two snapshots of the shared tensors.

The server's own tensors move on exactly; what clients hold, the *view*, follows them by coded steps. What
a step loses is still in ``shared - snapshot`` and so in the next step: error feedback without a memory of its
own. Server and node take a step by the same function, so they hold the same bits.

References:
    Hanlin Tang, Chen Yu, Xiangru Lian, Tong Zhang and Ji Liu. "DoubleSqueeze: Parallel Stochastic Gradient
    Descent with Double-pass Error-Compensated Compression." ICML 2019. https://arxiv.org/abs/1905.05957
    Kaja Gruntkowska, Alexander Tyurin and Peter Richtárik. "EF21-P and Friends: Improved Theoretical
    Communication Complexity for Distributed Optimization with Bidirectional Compression." ICML 2023.
    https://arxiv.org/abs/2209.15218
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.transforms.codec import Chain
from lichen.transforms.layout import Layout

__all__ = ["apply_delta", "encode_delta", "snapshot_name"]


def encode_delta(shared: Shared, snapshot: Shared, chain: Chain, seed: int) -> Tree:
    """What leads from ``snapshot`` towards ``shared``, without client axis, by names of the flat trees.

    Tensors of real numbers that both have, in one shape and dtype, go as one coded row ``wire``, save for those
    that stand still, which ``unchanged`` marks in name order; what is new, of another shape, frozen or not real goes
    as ``whole.<name>`` where it differs; ``gone.<name>`` is empty.

    Args:
        shared: The server's tensors.
        snapshot: What the clients hold.
        chain: Codes the difference.
        seed: Of what is random in that.
    """
    out: Tree = {}
    coded: Tree = {}
    unchanged: set[str] = set()
    moving, new, before = _moving(shared), shared.flat(), snapshot.flat()
    for name, x in new.items():
        old = before.get(name)
        alike = old is not None and old.shape == x.shape and old.dtype == x.dtype
        if old is not None and alike and name in moving:
            coded[name] = x
            unchanged |= {name} if torch.equal(x, old) else set()
        elif old is None or not alike or not torch.equal(x, old):
            out[f"whole.{name}"] = x
    out.update({f"gone.{name}": torch.empty(0, dtype=torch.uint8) for name in before if name not in new})
    if unchanged:
        out["still"] = torch.tensor([name in unchanged for name in sorted(coded)], dtype=torch.uint8)
        coded = {name: x for name, x in coded.items() if name not in unchanged}
    if coded:
        layout = Layout.of(coded)
        delta = {name: (x.float() - before[name].float()).unsqueeze(0) for name, x in coded.items()}
        out["wire"] = chain.encode(layout.flatten(delta), layout, [seed])[0]
    return out


def apply_delta(snapshot: Shared, payload: Mapping[str, Tensor], chain: Chain) -> Shared:
    """The next view.

    Args:
        snapshot: The last one.
        payload: What :func:`encode_delta` made.
        chain: What it was coded with.

    Raises:
        LichenError: if the step does not fit the view.
    """
    whole, rest = trees.split(payload, "whole.")
    gone, rest = trees.split(rest, "gone.")
    carried = {name: x for name, x in snapshot.flat().items() if name not in gone and name not in whole}
    moving = sorted(carried.keys() & _moving(snapshot))
    if "still" in rest:
        if rest["still"].shape != (len(moving),):
            raise LichenError("a step marks other tensors than the view's", where="wire", fix="send the whole view")
        moving = [name for name, stands in zip(moving, rest["still"].tolist(), strict=True) if not stands]
    layout = Layout.of({name: carried[name] for name in moving})
    delta: Tree = {}
    if "wire" in rest:
        wire = rest["wire"]
        delta = layout.by_name(chain.decode(wire.unsqueeze(0).to(_device(carried)), layout))
    elif layout.size:
        raise LichenError("a step lacks its coded row", where="wire", fix="send the whole view")
    moved = {n: (x.float() + delta[n][0]).to(x.dtype) if n in delta else x for n, x in carried.items()}
    return Shared.of_flat({**moved, **whole})


def snapshot_name(snapshot: Shared) -> str:
    """Sixteen hex digits of a view's digest: equal where all bits are."""
    return trees.digest(snapshot.flat())[:16]


def _moving(shared: Shared) -> set[str]:
    """Names of what moves by steps; what is frozen does not, and is sent whole if it differs."""
    return {name for name, x in replace(shared, frozen={}).flat().items() if x.is_floating_point()}


def _device(tree: Mapping[str, Tensor]) -> torch.device:
    return next((x.device for x in tree.values()), torch.device("cpu"))
