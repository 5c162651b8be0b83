"""Maps a model over the client axis: vectorised or one client at a time.

*Reference*: every client goes through the model in its own call, so its loss and its gradients have
the same bits in any company. *Stacked*: all clients go through the frozen layers in one call.

Why not always stacked: matrix kernels are chosen by the number of rows, vectorised activations
treat the tail of a buffer in other code than its body, and attention picks its kernel by whether
ANY row is padded. Each of these changes a client's last bits with its company (measured on x86 with
both fp32 and fp64), while rounding stays near 1e-6. A matrix product with one row may also sum in another
order where its numbers do not begin at a full cache line, so a client's slice of a stack is copied to one. On a CPU the
reference costs little (2 to 45 per cent more time, the most in small batches); an accelerator is
filled by stacking.

Legend: C clients, B rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lichen.core.contracts.model import Batch
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["aligned", "clients_of", "map_clients", "one_client", "row_by_row"]


CACHE_LINE = 64
"""Bytes; where torch lets every tensor of its own begin."""


def aligned(x: Tensor) -> Tensor:
    """The same numbers, copied to a tensor of its own if they do not begin at a cache line.

    A slice of a stack begins anywhere, a tensor of its own at a cache line, and BLAS may peel off what lies
    before it: then the same product has other bits.

    >>> x = torch.arange(34.0).reshape(2, 17)
    >>> aligned(x[:1]) is not x, aligned(x[1:]).data_ptr() % CACHE_LINE, x[1:].data_ptr() % CACHE_LINE
    (True, 0, 4)
    """
    return x if x.device.type != "cpu" or x.data_ptr() % CACHE_LINE == 0 else x.clone()


def clients_of(trainable_C: Tree, batch: Batch) -> int:
    """The number of clients, the same in the parameters and in the batch.

    Raises:
        LichenError: if a tensor carries another number of clients.
    """
    clients = int(batch["active_C"].shape[0])
    for name, x in (*trainable_C.items(), *batch.items()):
        if x.dim() == 0 or x.shape[0] != clients:
            raise LichenError(
                f"tensor {name!r} of shape {tuple(x.shape)} lacks a leading axis of {clients} clients", where="batch"
            )
    return clients


def one_client(batch: Batch, client: int) -> dict[str, Tensor]:
    """The batch of one client, still with its client axis (C = 1), without the columns it only pads.

    Its width is that of its own longest row, rounded up to 8: a block's width is its widest
    client's, and every padded column costs what a word costs.
    """
    mine = {name: x[client : client + 1] for name, x in batch.items()}
    if "attention_mask_CBT" not in mine:
        return mine
    attended_T = mine["attention_mask_CBT"].flatten(0, 1).any(0)
    last = int(attended_T.nonzero()[-1]) + 1 if bool(attended_T.any()) else 1
    width = min(-(-last // 8) * 8, attended_T.shape[0])
    return {name: x[:, :, :width] if name.endswith(("_CBT", "_CBTH")) else x for name, x in mine.items()}


def map_clients(
    function: Callable[[Tree, Batch], tuple[Tensor, ...]], trainable_C: Tree, batch: Batch, *, reference: bool
) -> tuple[Tensor, ...]:
    """Call ``function`` for all clients at once, or once for each, and join its ``(C, ...)`` results.

    Args:
        function: Takes stacked parameters and a batch, gives tensors with a leading client axis.
        trainable_C: Stacked parameters.
        batch: One step of C clients.
        reference: One call a client.

    Returns:
        The function's tensors, ``(C, ...)`` each.
    """
    clients = clients_of(trainable_C, batch)
    if not reference:
        return function(trainable_C, batch)
    # split, not indexing: its backward joins the gradients instead of adding zeros to them, which
    # would turn a client's -0.0 into 0.0.
    parts = {name: torch.split(x, 1) for name, x in trainable_C.items()}
    results = [
        function(
            {name: aligned(part[c]) for name, part in parts.items()},
            {name: aligned(x) for name, x in one_client(batch, c).items()},
        )
        for c in range(clients)
    ]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))


def row_by_row(
    loss: Callable[[Tree, Tree, Batch], tuple[Tensor, Tensor]], trainable_C: Tree, fixed: Tree, batch: Batch
) -> tuple[Tensor, Tensor]:
    """``(loss_CB, count_CB)`` from a model's ``loss`` of one row at a time.

    Slow, and right for every loss that is a sum over rows: models have faster ways, which are held against this one.

    Args:
        loss: As :meth:`lichen.core.contracts.model.CohortModel.loss`.
        trainable_C: Stacked parameters.
        fixed: Shared tensors without client axis.
        batch: One step of C clients; every tensor but ``active_C`` has rows after its clients.
    """
    rows = next(x.shape[1] for name, x in batch.items() if name != "active_C")
    pairs = []
    for b in range(rows):
        one = {name: x if name == "active_C" else x[:, b : b + 1] for name, x in batch.items()}
        pairs.append(loss(trainable_C, fixed, one))
    return torch.stack([loss_C for loss_C, _ in pairs], 1), torch.stack([count_C for _, count_C in pairs], 1)
