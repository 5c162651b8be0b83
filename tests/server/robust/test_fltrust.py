"""FLTrust trusts by direction, and nobody shouts.

Legend: C clients, N numbers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.message import Message
from lichen.core.tree import Tree
from lichen.core.wire.shared import Shared
from lichen.server.robust.fltrust import FLTrust

OWN = torch.tensor([3.0, 4.0])


def own(shared: Shared, version: int) -> Tree:
    del shared, version
    return {"x": OWN}


def message(x_CN: Tensor, versions: tuple[int, ...] = ()) -> Message:
    count = len(x_CN)
    return Message(
        group="g",
        client_C=torch.arange(count),
        version_C=torch.tensor(versions or (4,) * count),
        tensors={"x": x_CN},
        weight_C=torch.ones(count, dtype=torch.float64),
    )


def closed(member: FLTrust, sent: Message) -> tuple[Tree, dict[str, float]]:
    change, metrics = member.close(member.add(member.zero(), sent), Shared({"x": torch.zeros(2)}))
    return change.trainable, metrics


def test_gives_what_plain_loops_give() -> None:
    x_CN = torch.randn(9, 2, generator=torch.Generator().manual_seed(3)).double()
    top, bottom = [0.0, 0.0], 0.0
    for row in x_CN.tolist():
        norm = (row[0] ** 2 + row[1] ** 2) ** 0.5
        trust = max(0.0, (row[0] * 3 + row[1] * 4) / (norm * 5))
        top = [t + trust * 5 / norm * x for t, x in zip(top, row, strict=True)]
        bottom += trust
    change, metrics = closed(FLTrust(own), message(x_CN))
    assert torch.allclose(change["x"], torch.tensor([t / bottom for t in top]), rtol=0, atol=1e-6)
    assert metrics["clients"] == 9
    assert metrics["trust"] == pytest.approx(bottom / 9)


def test_a_long_change_counts_no_more_than_a_short_one_and_opposites_do_not_count() -> None:
    x_CN = torch.stack([OWN * 1e9, OWN, OWN * 1e-9, -OWN, torch.tensor([4.0, -3.0]), torch.zeros(2)])
    change, metrics = closed(FLTrust(own), message(x_CN))
    assert torch.allclose(change["x"], OWN)
    assert metrics["dropped"] == 3


def test_where_nobody_is_trusted_nothing_changes() -> None:
    change, metrics = closed(FLTrust(own), message(-OWN[None].repeat(3, 1)))
    assert change == {}
    assert metrics == {"clients": 3.0, "dropped": 3.0, "trust": 0.0, "too_few": 1.0}


def test_the_server_begins_where_the_clients_began() -> None:
    seen = []

    def noted(shared: Shared, version: int) -> Tree:
        seen.append((sorted(shared.trainable), version))
        return {"x": OWN}

    closed(FLTrust(noted), message(OWN[None]))
    assert seen == [(["x"], 4)]
    assert FLTrust(noted).one_version
    with pytest.raises(LichenError, match="versions 3 and 4"):
        closed(FLTrust(noted), message(OWN[None].repeat(2, 1), (4, 3)))
    with pytest.raises(LichenError, match="tensor 'x' is missing"):
        closed(FLTrust(lambda shared, version: {}), message(OWN[None]))
