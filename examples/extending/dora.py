"""DoRA as a third party would add it: one file with one :class:`~lichen.models.adapters.kind.AdapterKind`.

::

    y = m_c / |W + s B_c A_c| * x (W + s B_c A_c)' + b      for the rows of client c

A low-rank adapter turns the rows of the frozen weight, and a vector m says how long they are; ``|.|`` is the norm of
each row. It starts as the frozen model: B is zero, and m holds the rows' own norms. As in the paper (section 4.3) and
in PEFT, no gradient flows through the norm.

A package brings it by an entry point; a recipe then says ``model.adapter.kind: dora``::

    [project.entry-points."lichen.adapters"]
    dora = "dora:DORA"

References:
    Shih-Yang Liu, Chien-Yi Wang, Hongxu Yin, Pavlo Molchanov, Yu-Chiang Frank Wang, Kwang-Ting Cheng and Min-Hung Chen.
    "DoRA: Weight-Decomposed Low-Rank Adaptation." ICML 2024. https://arxiv.org/abs/2402.09353

Legend: C clients, r rank, i in, o out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from lichen.core.conventions.factor_pairs import is_factor
from lichen.core.tree import Tree
from lichen.models.adapters.heads import client_linear
from lichen.models.adapters.kind import BEFORE_LAYERS, AdapterKind, PeftTensors
from lichen.models.adapters.linear_layers import frozen_linear, frozen_weight, is_conv1d, oriented, target_layers
from lichen.models.adapters.lora import LORA, Lora
from lichen.models.adapters.lora_peft import LORA_PEFT
from lichen.models.adapters.table import Facts
from lichen.models.packing.packing import Packing

MAGNITUDE = "lora_magnitude_vector"
"""What PEFT calls m."""


@final
@dataclass(frozen=True, slots=True)
class Dora:
    """What is trained: as of LoRA, and a vector for each of its layers."""

    lora: Lora

    @property
    def heads(self) -> tuple[str, ...]:
        return self.lora.heads

    @property
    def kind(self) -> AdapterKind:
        return DORA


def row_norms(weight_oi: Tensor, A_ri: Tensor, B_or: Tensor, scale: float) -> Tensor:
    """``|W + s B A|`` of each row, of one client or, with a leading axis of A and B, of C; nothing of W's size is made.

    >>> W, A, B = torch.randn(5, 4), torch.randn(3, 2, 4), torch.randn(3, 5, 2)
    >>> torch.allclose(row_norms(W, A, B, 0.5), (W + 0.5 * B @ A).norm(dim=-1), atol=1e-5)
    True
    """
    cross = (B_or * (weight_oi @ A_ri.mT)).sum(-1)
    own = (B_or * (B_or @ (A_ri @ A_ri.mT))).sum(-1)
    return (weight_oi.square().sum(-1) + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


@final
class DoraLinear(nn.Module):
    """A frozen linear layer with C clients' factors and magnitudes, which come in through ``functional_call``."""

    buffer_names = ("lora_A", "lora_B", MAGNITUDE)

    def __init__(self, layer: Any, *, scale: float, packing: Packing) -> None:
        super().__init__()
        self.packing, self.scale, self.transposed = packing, scale, is_conv1d(layer)
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        for name in self.buffer_names:
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        A_Cri, B_Cor, m_Co = (self.get_buffer(name) for name in self.buffer_names)
        with torch.no_grad():
            norm_Co = row_norms(frozen_weight(self).to(A_Cri.dtype), A_Cri, B_Cor, self.scale)
        none = x.new_empty(0)
        low = client_linear(client_linear(x, A_Cri, none, self.packing), B_Cor * self.scale, none, self.packing)
        y = frozen_linear(self, x) + low
        y = y * self.packing.at_rows(m_Co / norm_Co, y)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def build(section: Any, heads: tuple[str, ...]) -> Dora:
    """From the recipe's keys, which are those of LoRA."""
    return Dora(LORA.build(section, heads))  # type: ignore[arg-type]


def place(model: Any, spec: Dora, packing: Packing, heads: Sequence[str]) -> tuple[str, ...]:
    """On the layers that the recipe's targets name."""
    layers = target_layers(model, spec.lora.targets, heads, last=spec.lora.last)
    for path in layers:
        layer = model.get_submodule(path)
        model.set_submodule(path, DoraLinear(layer, scale=spec.lora.scale, packing=packing))
    return layers


def start(model: Any, path: str, spec: Dora, seed: int) -> Tree:
    """Factors as LoRA starts them, and the norms of the frozen rows."""
    factors = LORA.start(model, path, spec.lora, seed)
    weight_oi = frozen_weight(model.get_submodule(path)).detach().to(factors["lora_A"].dtype)
    return factors | {MAGNITUDE: row_norms(weight_oi, factors["lora_A"], factors["lora_B"], spec.lora.scale)}


def merge(layer: Any, path: str, own: Tree, spec: Dora, change_oi: Tensor) -> Tree:
    """Rows turned, then as long as m says."""
    A_ri, B_or, m_o = (own[name].double() for name in DoraLinear.buffer_names)
    weight_oi = oriented(layer, layer.weight).double() + change_oi + spec.lora.scale * (B_or @ A_ri)
    return {"weight": oriented(layer, weight_oi * (m_o / weight_oi.norm(dim=1))[:, None])}


def write(tree: Tree, spec: Dora, patches: Mapping[str, Mapping[str, Tensor]]) -> PeftTensors:
    """What PEFT writes with ``use_dora=True``."""
    written = LORA_PEFT.write(tree, spec.lora, patches)
    magnitudes = {name: x for name, x in tree.items() if name.endswith(f".{MAGNITUDE}")}
    return PeftTensors(
        own=written.own | magnitudes.keys(),
        tensors=written.tensors | {BEFORE_LAYERS + name: x for name, x in magnitudes.items()},
        fields=written.fields | {"use_dora": True},
    )


def begin(tree: Tree, fresh: Tree, spec: Dora, config: Mapping[str, Any], where: str) -> tuple[Tree, list[str]]:
    """Factors as a run with LoRA takes them; magnitudes as they are, or the frozen rows' norms."""
    theirs, ours = ({name: x for name, x in one.items() if is_factor(name)} for one in (tree, fresh))
    found, notes = LORA_PEFT.begin(theirs, ours, spec.lora, config, where)
    return {name: found.get(name, tree.get(name, x)) for name, x in fresh.items()}, notes


DORA = AdapterKind(
    facts=Facts(
        word="dora",
        means="m (W + s B A) / |W + s B A|",
        paper="Liu et al. 2024, arXiv:2402.09353",
        keys=("target_modules", "rank", "alpha", "rslora", "last"),
    ),
    build=build,
    place=place,
    start=start,
    tensors=DoraLinear.buffer_names,
    merge=merge,
    peft=replace(
        LORA_PEFT,
        write=write,
        begin=begin,
        honoured=LORA_PEFT.honoured | {"use_dora"},
        plain={key: value for key, value in LORA_PEFT.plain.items() if key != "use_dora"},
        needed={"use_dora": True},
    ),
)
"""The entry point names this."""
