"""How much each of a client's training rows moves its validation loss: DataInf, layer by layer, in closed form.

With g_i the gradient of row i's loss at the trained tensors of a layer, v that of the validation rows' mean loss, n
rows:

    λ = mean of g² over rows and numbers, divided by 10
    h = 1/n Σ_i (g_i g_iᵀ + λ I)⁻¹ v = 1/(n λ) Σ_i (v − ⟨v, g_i⟩ / (λ + ‖g_i‖²) g_i)
    influence of row i = −⟨h, g_i⟩, added up over layers

That is the slope of the validation loss in the weight of a row, with the inverse of a mean put as the mean of inverses,
which is exact for one row and off by little where a layer is small. Above 0: the loss would fall without the row, as it
does where its label is wrong. Nothing here leaves the client.

Rows are gone through three times, a few side by side, so that no more than these gradients are held.

References:
    Yongchan Kwon, Eric Wu, Kevin Wu and James Zou. "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs
    and Diffusion Models." ICLR 2024. https://arxiv.org/abs/2310.00902

Legend: N rows, R rows side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lichen.clients.privacy.row_gradients import row_gradients
from lichen.core import tree as trees
from lichen.core.contracts.model import Batch, CohortModel
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared

__all__ = ["influences"]

_DAMPING = 10.0
"""What the mean square of a gradient's numbers is divided by to make λ."""

_AT_ONCE = 1 << 27
"""Bytes of row gradients at once, at most, unless one row has more."""

Batches = Callable[[], Iterable[Batch]]
"""Gives one client's batches anew, the same each time."""


def influences(model: CohortModel, shared: Shared, rows: Batches, valid: Batches) -> Tensor:
    """The influence of every training row on the validation loss, float64 ``(N,)``, in the order of the batches.

    Args:
        model: What was trained.
        shared: What it has learned.
        rows: The client's training rows.
        valid: Its validation rows.

    Raises:
        LichenError: if one of the two has no row, or a gradient is not finite.
    """
    v, count = None, 0
    for grads_R in _gradients(model, shared, valid()):
        part = {name: x.double().sum(0) for name, x in grads_R.items()}
        v = part if v is None else trees.add(v, part)
        count += len(next(iter(grads_R.values())))
    if v is None:
        raise LichenError("no validation row to be judged by", where="data.valid", fix="set data.valid")
    v = trees.scale(v, 1 / count)
    squares: list[Tree] = []
    products: list[Tree] = []
    for grads_R in _gradients(model, shared, rows()):
        flat = {name: x.double().flatten(1) for name, x in grads_R.items()}
        squares.append({name: x.square().sum(1) for name, x in flat.items()})
        products.append({name: x @ v[name].flatten() for name, x in flat.items()})
    if not squares:
        raise LichenError("no training row", where="data", fix="choose a client with training rows")
    square_N, product_N = trees.concatenate(squares), trees.concatenate(products)
    if not all(bool(x.isfinite().all()) for x in (*square_N.values(), *product_N.values())):
        raise LichenError("a row's gradient is not finite", where="model", fix="use a run whose training went well")
    # A layer that no row moves has no say.
    damping = {name: x.mean() / v[name].numel() / _DAMPING for name, x in square_N.items()}
    h = _solved(model, shared, rows, v, damping, {n: product_N[n] / (damping[n] + x) for n, x in square_N.items()})
    found = [
        sum((-(x.double().flatten(1) @ h[name].flatten()) for name, x in grads_R.items()), start=torch.zeros(()))
        for grads_R in _gradients(model, shared, rows())
    ]
    return torch.cat(found).cpu()


def _solved(model: CohortModel, shared: Shared, rows: Batches, v: Tree, damping: Tree, factor_N: Tree) -> Tree:
    """h of every layer."""
    total, at = trees.zeros_like(v), 0
    for grads_R in _gradients(model, shared, rows()):
        count = len(next(iter(grads_R.values())))
        for name, x in grads_R.items():
            total[name] += torch.tensordot(factor_N[name][at : at + count], x.double(), dims=1)
        at += count
    return {
        name: (x - total[name] / at) / damping[name] if bool(damping[name] > 0) else torch.zeros_like(x)
        for name, x in v.items()
    }


def _gradients(model: CohortModel, shared: Shared, batches: Iterable[Batch]) -> Iterator[Tree]:
    """Gradients of rows that have a label, ``(R, ...)``, in order."""
    params_C = trees.broadcast(shared.trainable, 1)
    at_once = max(1, _AT_ONCE // max(1, trees.nbytes(shared.trainable)))
    for batch in batches:
        for _, grads_R in row_gradients(model, params_C, {}, shared.fixed, batch, at_once=at_once):
            yield grads_R
