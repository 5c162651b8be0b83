"""Gathers features that clients upload, in the clients' order.

Research: no recipe and no public name reaches this module.

Not a sum: every client's rows are kept as they came, and the order in which messages arrive does not show.

References:
    Chaoyang He, Murali Annavaram and Salman Avestimehr. "Group Knowledge Transfer: Federated Learning of
    Large CNNs at the Edge." NeurIPS 2020. https://arxiv.org/abs/2007.14513

Legend: M rows of all clients, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree, digest
from lichen.core.wire.shared import Shared
from lichen.server.single import SingleMessages
from lichen.server.sums.summed import weigh_C

__all__ = ["GatherFeatures"]

FeaturesTotal = tuple[tuple[int, Tree], ...]
"""Client and its tensors, in the order of arrival."""

_NAMES = ("features", "labels", "logits")


@final
@dataclass(frozen=True, slots=True)
class GatherFeatures(SingleMessages):
    """Gathers :class:`lichen.research.gkt.features.FeatureUpload` messages, and keeps each single one."""

    one_version: ClassVar[bool] = True

    def zero(self) -> FeaturesTotal:
        """Nothing gathered."""
        return ()

    def add(self, total: FeaturesTotal, message: Message, discount_C: Tensor | None = None) -> FeaturesTotal:
        """With every client's rows; one of weight 0 has none, also where a discount of 0 makes it so.

        Raises:
            LichenError: if a message holds no offered rows.
        """
        shapes = {name: tuple(x.shape[1:]) for name, x in message.tensors.items()}
        rows = shapes.get("labels", (0,))[0] if len(shapes.get("labels", ())) == 1 else -1
        if sorted(shapes) != list(_NAMES) or any(
            len(s) != 1 + (n != "labels") or s[0] != rows for n, s in shapes.items()
        ):
            raise LichenError(
                f"expected features (N, F), logits (N, K) and labels (N), got {shapes}",
                where="aggregator.offers",
                fix="pair GatherFeatures with the work FeatureUpload",
            )
        weight_C = weigh_C(message, "examples", discount_C)
        new = [
            (int(client), {name: x[c] for name, x in message.tensors.items()})
            for c, client in enumerate(message.client_C.tolist())
            if float(weight_C[c]) > 0
        ]
        return (*total, *new)

    def clients(self, total: FeaturesTotal) -> int:
        """Clients whose rows were gathered."""
        return len(total)

    def merge(self, a: FeaturesTotal, b: FeaturesTotal) -> FeaturesTotal:
        """Both."""
        return (*a, *b)

    def close(self, total: FeaturesTotal, shared: Shared) -> tuple[Shared, dict[str, float]]:
        """``features`` ``(M, F)``, ``logits`` ``(M, K)``, ``labels`` ``(M,)`` and ``client`` ``(M,)`` int64.

        Metrics are ``clients`` and ``examples``.

        Raises:
            LichenError: if nothing was gathered, or clients' features differ in width.
        """
        if not total:
            raise LichenError("no client offered rows", where="aggregator.offers", fix="invite clients that have rows")
        ordered = sorted(total, key=lambda pair: (pair[0], digest(pair[1])))
        widths = {(tree["features"].shape[1], tree["logits"].shape[1]) for _, tree in ordered}
        if len(widths) > 1:
            raise LichenError(
                f"clients offer features and classes of different numbers: {sorted(widths)}",
                where="aggregator.offers",
                fix="let every client's network end in equally many features",
            )
        rows = {name: torch.cat([tree[name].cpu() for _, tree in ordered]) for name in _NAMES}
        counts = torch.tensor([len(tree["labels"]) for _, tree in ordered])
        rows["client"] = torch.tensor([client for client, _ in ordered]).repeat_interleave(counts)
        return Shared(rows), {"clients": float(len(ordered)), "examples": float(counts.sum())}

    def dump(self, total: FeaturesTotal) -> tuple[Tree, dict[str, Any]]:
        """``(tensors, header)`` of a total."""
        tensors = {f"{at}/{name}": x for at, (_, tree) in enumerate(total) for name, x in tree.items()}
        return tensors, {"clients": [client for client, _ in total]}

    def load(self, tensors: Tree, header: Mapping[str, Any]) -> FeaturesTotal:
        """Undo :meth:`dump`.

        Raises:
            LichenError: if these are no offers.
        """
        try:
            clients = [int(client) for client in header["clients"]]
            return tuple((c, {name: tensors[f"{at}/{name}"] for name in _NAMES}) for at, c in enumerate(clients))
        except (KeyError, TypeError, ValueError) as error:
            raise LichenError(
                f"these are no offers: {error!r}", where="aggregator.offers", fix="send it again"
            ) from None
