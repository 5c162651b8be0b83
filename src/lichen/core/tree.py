"""Model state as a flat ``dict[str, Tensor]``, and arithmetic on it.

Legend: C clients. A *stacked* tree carries a leading client axis on every tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lichen.core.errors import LichenError

__all__ = [
    "Tree",
    "add",
    "block_of",
    "broadcast",
    "check_same",
    "concatenate",
    "digest",
    "expand",
    "join",
    "map_tree",
    "nbytes",
    "norm_C",
    "plain",
    "scale",
    "split",
    "stack",
    "sub",
    "take",
    "to_device",
    "zeros_like",
]

Tree = dict[str, Tensor]


def map_tree(function: Callable[..., Tensor], first: Mapping[str, Tensor], *rest: Mapping[str, Tensor]) -> Tree:
    """Apply ``function`` leaf by leaf over trees with the same names.

    >>> map_tree(torch.add, {"a": torch.ones(2)}, {"a": torch.ones(2)})
    {'a': tensor([2., 2.])}
    """
    for other in rest:
        if other.keys() != first.keys():
            raise LichenError(f"trees differ in names: {sorted(first.keys() ^ other.keys())[:4]}", where="tree")
    return {name: function(leaf, *(other[name] for other in rest)) for name, leaf in first.items()}


def block_of(name: str) -> int | None:
    """The number of the block a tensor or layer lies in, counted from the model's input; None outside the stack.

    It is the first number in the name, as in all transformers models.

    >>> block_of("model.layers.7.self_attn.q_proj.lora_A"), block_of("classifier.weight")
    (7, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def add(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """``a + b``, leaf by leaf."""
    return map_tree(torch.add, a, b)


def sub(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tree:
    """``a - b``, leaf by leaf; a stacked ``a`` broadcasts against an unstacked ``b``."""
    return map_tree(torch.sub, a, b)


def scale(tree: Mapping[str, Tensor], factor: float) -> Tree:
    """Every leaf times ``factor``."""
    return map_tree(lambda x: x * factor, tree)


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    """A tree of zeros with the same names, shapes and dtypes."""
    return map_tree(torch.zeros_like, tree)


def stack(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Put unstacked trees side by side on a new leading client axis."""
    return map_tree(lambda *leaves: torch.stack(leaves), *trees)


def concatenate(trees: Sequence[Mapping[str, Tensor]]) -> Tree:
    """Join stacked trees along their client axis."""
    return map_tree(lambda *leaves: torch.cat(leaves), *trees)


def take(tree: Mapping[str, Tensor], client: int) -> Tree:
    """One client's tree out of a stacked one."""
    return map_tree(lambda x: x[client], tree)


def broadcast(tree: Mapping[str, Tensor], clients: int) -> Tree:
    """Copy an unstacked tree to ``clients`` clients: every leaf becomes contiguous ``(C, ...)``."""
    return map_tree(lambda x: x.detach().unsqueeze(0).repeat(clients, *([1] * x.dim())), tree)


def expand(tree: Mapping[str, Tensor], clients: int) -> Tree:
    """The same for clients that only read: every leaf is ``(C, ...)`` and takes the memory of one client."""
    return map_tree(lambda x: x.detach().unsqueeze(0).expand(clients, *x.shape), tree)


def split(tree: Mapping[str, Tensor], prefix: str) -> tuple[Tree, Tree]:
    """Part a tree by name: (those under ``prefix``, with it removed; the rest).

    >>> split({"patch.q": torch.ones(1), "q": torch.ones(1)}, "patch.")
    ({'q': tensor([1.])}, {'q': tensor([1.])})
    """
    inside = {name.removeprefix(prefix): x for name, x in tree.items() if name.startswith(prefix)}
    return inside, {name: x for name, x in tree.items() if not name.startswith(prefix)}


def join(prefix: str, inside: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> Tree:
    """Undo :func:`split`."""
    return {**rest, **{prefix + name: x for name, x in inside.items()}}


def norm_C(tree: Mapping[str, Tensor]) -> Tensor:
    """Euclidean norm of each client's whole tree, shape ``(C,)``; leaves are ``(C, ...)``.

    Client by client: torch splits a reduction by the whole tensor's shape, so summing along a
    stacked tensor would give a client other bits in other company. By name: a tree read back from
    bytes has its names in another order.
    """
    clients = next(iter(tree.values())).shape[0]
    return torch.stack(
        [sum((tree[name][c].square().sum() for name in sorted(tree)), torch.zeros(())) for c in range(clients)]
    ).sqrt()


def nbytes(tree: Mapping[str, Tensor]) -> int:
    """Bytes held by the leaves."""
    return sum(x.numel() * x.element_size() for x in tree.values())


def digest(tree: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order (64 hex digits)."""
    total = hashlib.sha256()
    for name in sorted(tree):
        leaf = tree[name].detach().cpu().contiguous()
        total.update(f"{name}|{leaf.dtype}|{tuple(leaf.shape)}|".encode())
        total.update(leaf.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def to_device(tree: Mapping[str, Tensor], device: torch.device | str) -> Tree:
    """Every leaf on ``device``; those that are there already are not copied."""
    return {name: x.to(device, non_blocking=True) for name, x in tree.items()}


def plain(tree: Mapping[str, Tensor]) -> Tree:
    """Detached contiguous CPU leaves, no two on one storage, as safetensors wants them."""
    seen: set[int] = set()
    out: Tree = {}
    for name, leaf in tree.items():
        leaf = leaf.detach().cpu().contiguous()
        place = leaf.untyped_storage().data_ptr()
        out[name] = leaf.clone() if place in seen else leaf
        seen.add(place)
    return out


def check_same(tree: Mapping[str, Tensor], like: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse a tree whose names or shapes differ from ``like``.

    Raises:
        LichenError: naming the first tensor that is missing, unexpected or of another shape.
    """
    for name in sorted(like.keys() | tree.keys()):
        if name not in tree:
            raise LichenError(f"tensor {name!r} is missing", where=where)
        if name not in like:
            raise LichenError(f"unexpected tensor {name!r}", where=where)
        if tree[name].shape != like[name].shape:
            raise LichenError(
                f"tensor {name!r} has shape {tuple(tree[name].shape)}, expected {tuple(like[name].shape)}", where=where
            )
