"""Low-rank adapters and full-rank heads with a leading client axis beside one frozen model.

``wrap`` gives a new module structure around the SAME weight tensors: the caller's model stays as it
was. Trainable tensors and patches then enter each call through ``torch.func.functional_call``::

    y = x (W + patch)' + alpha / r * (x A_c') B_c'      for the rows of client c

References:
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen (2022). LoRA: Low-Rank Adaptation of Large
    Language Models. ICLR 2022, arXiv:2106.09685.

Legend: C clients, N rows of one client (B or B*T), r rank, i in, o out, R rank of a factored patch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator
from lichen.core.tree import Tree, split
from lichen.models.grouped import packed_adapter
from lichen.models.heads import CLIENT_LAYERS, wrap_layer
from lichen.models.packing import Packing

__all__ = ["Lora", "LoraLinear", "Wrapped", "all_linear", "is_linear", "oriented", "wrap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What of a model is trained.

    Attributes:
        targets: Ends of layer names as in PEFT (``q_proj`` fits ``model.layers.0.self_attn.q_proj``),
            or ``"all-linear"``: every linear layer but the output layer. Empty: no adapter.
        rank: Rank r.
        alpha: The adapter is scaled by ``alpha / rank``.
        heads: Ends of names of layers trained whole (PEFT's ``modules_to_save``).
        last: Adapters only in the last so many layers of the stack; None: in all.
    """

    targets: tuple[str, ...] | str
    rank: int = 8
    alpha: float = 16.0
    heads: tuple[str, ...] = ()
    last: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise LichenError(f"rank {self.rank} is below 1", where="adapter.rank", fix="use 4, 8 or 16")
        if not self.alpha > 0:
            raise LichenError(f"alpha {self.alpha} is not positive", where="adapter.alpha", fix="use twice the rank")

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D)


def is_linear(layer: nn.Module) -> bool:
    """Whether an adapter fits: ``nn.Linear``, or the transposed ``Conv1D`` of GPT-2."""
    return isinstance(layer, nn.Linear) or _is_conv1d(layer)


def oriented(layer: nn.Module, matrix_oi: Tensor) -> Tensor:
    """An (out, in) matrix as the layer's own weight lies."""
    return matrix_oi.t() if _is_conv1d(layer) else matrix_oi


@final
class LoraLinear(nn.Module):
    """A frozen linear layer with C low-rank adapters and a patch, which come in through ``functional_call``.

    Rows are the clients' in equal numbers, or packed as ``packing`` says.
    """

    def __init__(self, layer: Any, *, scale: float, packing: Packing | None = None) -> None:
        super().__init__()
        self.packing = packing or Packing()
        self.weight: nn.Parameter = layer.weight
        self.bias: nn.Parameter | None = layer.bias
        self.transposed = _is_conv1d(layer)
        self.scale = scale
        self.out_features, self.in_features = oriented(layer, layer.weight).shape
        for name in ("lora_A", "lora_B", "patch_dense", "patch_left", "patch_right"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(C*B, ..., in)`` to ``(C*B, ..., out)``."""
        A_Cri, B_Cor = self.get_buffer("lora_A"), self.get_buffer("lora_B")
        dense, left_oR, right_Ri = (self.get_buffer(f"patch_{name}") for name in ("dense", "left", "right"))
        weight_oi = self.weight.t() if self.transposed else self.weight
        if dense.numel():
            weight_oi = weight_oi + dense.to(weight_oi.dtype)
        pack = self.packing.current
        if pack is None:
            y = nn.functional.linear(x, weight_oi, self.bias)
        else:
            x_Ni = x.reshape(-1, self.in_features)
            y = packed_adapter(x_Ni, weight_oi, self.bias, A_Cri, B_Cor, scale=self.scale, pack=pack)
            y = y.reshape(*x.shape[:-1], self.out_features)
        if left_oR.numel() and not dense.numel():
            y = y + nn.functional.linear(nn.functional.linear(x.to(right_Ri.dtype), right_Ri), left_oR).to(y.dtype)
        if pack is not None:
            return y
        x_CNi = x.reshape(A_Cri.shape[0], -1, self.in_features).to(A_Cri.dtype)
        low_CNo = torch.bmm(torch.bmm(x_CNi, A_Cri.transpose(1, 2)), B_Cor.transpose(1, 2)) * self.scale
        return y + low_CNo.reshape(y.shape).to(y.dtype)


@final
@dataclass(frozen=True, slots=True)
class Wrapped:
    """A frozen model with places for C clients' tensors.

    Attributes:
        model: The new structure around the same weights.
        layers: Names of the layers with an adapter.
        heads: Names of the layers trained whole.
        spec: What was asked for.
        packing: What its layers look at to know whether rows are packed.
    """

    model: Any
    layers: tuple[str, ...]
    heads: tuple[str, ...]
    spec: Lora
    packing: Packing

    def init(self, seed: int) -> Tree:
        """Start values without client axis: A uniform in ±1/sqrt(in), B zero, heads as the model has them."""
        tree: Tree = {}
        for path in self.layers:
            layer = self.model.get_submodule(path)
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            uniform = torch.rand(self.spec.rank, layer.in_features, generator=torch_generator(seed, "lora_A", path))
            A_ri = ((2 * uniform - 1) / layer.in_features**0.5).to(dtype)
            tree[f"{path}.lora_A"] = A_ri.to(layer.weight.device)
            tree[f"{path}.lora_B"] = torch.zeros(
                layer.out_features, self.spec.rank, dtype=dtype, device=layer.weight.device
            )
        for path in self.heads:
            for name, x in self.model.get_submodule(path).start.items():
                tree[f"{path}.{name}"] = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)
        return tree

    def frozen(self) -> Tree:
        """The weights no client trains, each once."""
        trained = {f"{path}.{name}" for path in self.heads for name in self.model.get_submodule(path).start}
        persistent = self.model.state_dict(keep_vars=True).keys()
        every = chain(self.model.named_parameters(), self.model.named_buffers())
        return {name: x for name, x in every if name in persistent and name not in trained}

    def tensors(self, trainable_C: Tree, fixed: Tree) -> Tree:
        """What ``functional_call`` puts in: the clients' tensors, and the patch on its layers.

        Raises:
            LichenError: for a missing or unknown trainable tensor, or a patch on a layer without adapter.
        """
        names = [f"{path}.lora_{x}" for path in self.layers for x in "AB"]
        names += [f"{path}.{name}" for path in self.heads for name in self.model.get_submodule(path).start]
        if trainable_C.keys() != set(names):
            odd = sorted(trainable_C.keys() ^ set(names))[0]
            state = "is missing" if odd in names else "belongs to no layer of this model"
            raise LichenError(f"trainable tensor {odd!r} {state}", where="adapter", fix="use the run's own adapter")
        ready = dict(trainable_C)
        for name, x in split(fixed, "patch.")[0].items():
            path, _, kind = name.rpartition(".")
            if path not in self.layers or kind not in ("dense", "left", "right"):
                raise LichenError(f"the patch {name!r} fits no layer with an adapter", where="job")
            ready[f"{path}.patch_{kind}"] = x
        return ready

    def call(self, trainable_C: Tree, fixed: Tree, /, *, part: str = "", **inputs: Any) -> Any:
        """The model's output, or that of the submodule ``part``, for C clients' rows stacked on the first axis."""
        ready = self.tensors(trainable_C, fixed)
        module = self.model.get_submodule(part)
        inside = split(ready, f"{part}.")[0] if part else ready
        # Not tied: a head trained whole must leave the embedding it was tied to alone.
        return functional_call(module, inside, kwargs=inputs, tie_weights=False)


def all_linear(model: Any) -> tuple[str, ...]:
    """Every linear layer but the output layer and a classification head, as PEFT's ``all-linear``."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return tuple(
        name
        for name, layer in model.named_modules()
        if is_linear(layer) and layer is not output and name.split(".")[0] not in ("score", "classifier")
    )


def _fits(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _refuse_unknown(ends: Sequence[str], found: Sequence[str], *, where: str) -> None:
    for end in ends:
        if not any(_fits(name, (end,)) for name in found):
            known = sorted({name.rpartition(".")[2] for name in found})
            raise LichenError(f"no layer is called {end!r}", where=where, fix=f"use some of: {', '.join(known)}")


def _last_blocks(model: Any, last: int | None) -> str | tuple[str, ...]:
    """How names in the last blocks of the model's stack begin; the empty beginning of all names for None.

    Raises:
        LichenError: if the model has no such stack, or fewer blocks.
    """
    if last is None:
        return ""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [name for name, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not 1 <= last <= len(blocks):
        raise LichenError(f"the model has {len(blocks)} layers", where="adapter.last", fix="name as many at most")
    return tuple(f"{name}." for name in blocks[-last:])


def wrap(model: Any, spec: Lora) -> Wrapped:
    """Put adapters and heads on chosen layers of a frozen model, which itself stays untouched.

    Args:
        model: A transformers model.
        spec: What is trained.

    Raises:
        LichenError: if a name in ``targets`` or ``heads`` fits no layer, or nothing would be trained.
    """
    modules = dict(model.named_modules())
    _refuse_unknown(spec.heads, [name for name in modules if name], where="adapter.heads")
    under = [name for name in modules if name and _fits(name, spec.heads)]
    heads = tuple(
        name
        for name, layer in modules.items()
        if type(layer) in CLIENT_LAYERS and any(name == head or name.startswith(f"{head}.") for head in under)
    )
    linear = [name for name, layer in modules.items() if is_linear(layer)]
    if isinstance(spec.targets, str):
        if spec.targets != "all-linear":
            raise LichenError(f"{spec.targets!r} is no list", where="adapter.targets", fix="a list, or all-linear")
        chosen = all_linear(model)
    else:
        _refuse_unknown(spec.targets, linear, where="adapter.targets")
        chosen = tuple(name for name in linear if _fits(name, spec.targets))
    above = _last_blocks(model, spec.last)
    layers = tuple(name for name in chosen if name not in heads and name.startswith(above))
    if not layers and not heads:
        raise LichenError("nothing would be trained", where="adapter", fix="name targets or heads")
    shared: dict[int, Any] = {id(x): x for x in chain(model.parameters(), model.buffers())}
    twin, packing = copy.deepcopy(model, shared), Packing()
    for path in layers:
        twin.set_submodule(path, LoraLinear(twin.get_submodule(path), scale=spec.scale, packing=packing))
    for path in heads:
        twin.set_submodule(path, wrap_layer(twin.get_submodule(path), packing))
    return Wrapped(twin.eval(), layers, heads, spec, packing)
