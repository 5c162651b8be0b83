"""What a weaker client gets: the first directions, and the function of the blocks it leaves alone.

Legend: m rows, n columns, r rank.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_job, unpack_job
from lichen.core.tree import Tree, digest, nbytes
from lichen.core.wire.shared import Shared
from lichen.server.lowrank.submodel import Capacity
from support.dense_adapters import held, patch

SCALING = 2.0


def start(patches: Any = ()) -> Any:
    g = torch.Generator().manual_seed(0)
    shared = {"score.weight": torch.randn(3, 7, generator=g)}
    for block in (2, 9, 10):
        for part, (m, n) in {"q_proj": (6, 8), "down": (8, 5)}.items():
            layer = f"model.layers.{block}.{part}"
            shared[f"{layer}.lora_A"] = torch.randn(4, n, generator=g)
            shared[f"{layer}.lora_B"] = torch.randn(m, 4, generator=g)
            if "factored" in patches:
                shared[f"patch.{layer}.left"] = torch.randn(m, 1, generator=g)
                shared[f"patch.{layer}.right"] = torch.randn(1, n, generator=g)
            if "dense" in patches:
                shared[f"patch.{layer}.dense"] = torch.randn(m, n, generator=g)
    shared["pooler.lora_A"], shared["pooler.lora_B"] = torch.randn(4, 7, generator=g), torch.randn(7, 4, generator=g)
    return shared


def layers(shared: Tree) -> Any:
    return {name.removesuffix(".lora_A") for name in shared if name.endswith(".lora_A")}


def cut(shared: Tree, rank: int, last: Any) -> Any:
    capacity = Capacity((rank,), last_N=(last,), scaling=SCALING)
    return capacity.extract(Shared.of_flat(shared), capacity.key(0)).flat()


@pytest.mark.parametrize("patches", [(), ("factored",), ("dense",)])
@pytest.mark.parametrize("last", [1, 2])
def test_the_blocks_left_alone_are_the_same_function(patches: Any, last: Any) -> None:
    shared = start(patches)
    before = digest(shared)
    out = cut(shared, 4, last)
    still = {9, 10} if last == 2 else {10}
    for layer in layers(shared):
        block = int(layer.split(".")[2]) if layer != "pooler" else 10
        if block in still:
            assert torch.equal(out[f"{layer}.lora_A"], shared[f"{layer}.lora_A"])
            assert torch.equal(patch(out, layer), patch(shared, layer))
        else:
            assert f"{layer}.lora_A" not in out
            assert f"{layer}.lora_B" not in out
            got, true = dense(out, layer), held(shared, layer, SCALING)
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)
    assert torch.equal(out["score.weight"], shared["score.weight"])
    assert digest(shared) == before


def dense(shared: Tree, layer: str) -> Any:
    if f"patch.{layer}.dense" in shared:
        return shared[f"patch.{layer}.dense"].double()
    return shared[f"patch.{layer}.left"].double() @ shared[f"patch.{layer}.right"].double()


@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_the_first_directions(rank: int) -> None:
    shared = start()
    out = cut(shared, rank, None)
    assert out.keys() == shared.keys()
    for layer in layers(shared):
        assert torch.equal(out[f"{layer}.lora_A"], shared[f"{layer}.lora_A"][:rank])
        assert torch.equal(out[f"{layer}.lora_B"], shared[f"{layer}.lora_B"][:, :rank])
    assert nbytes(out) < nbytes(shared) or rank >= 4


def test_an_adapter_that_does_nothing_costs_nothing() -> None:
    shared = {n: x * 0 if n.endswith("lora_B") else x for n, x in start().items()}
    out = cut(shared, 4, 1)
    assert not any(name.startswith("patch.") for name in out)
    assert layers(out) == {"model.layers.10.q_proj", "model.layers.10.down", "pooler"}


def test_a_cut_job_crosses_as_bytes() -> None:
    job = Job(work="train", shared=Shared.of_flat(cut(start(("factored",)), 2, 1)), version=0, clients=(0,), seed=1)
    assert digest(unpack_job(pack_job(job)).shared.flat()) == digest(job.shared.flat())


def test_equal_clients_have_equal_keys() -> None:
    capacity = Capacity((4, 2, 4, 2), last_N=(None, 1, None, 2), scaling=1.0)
    keys = [capacity.key(client) for client in range(4)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(LichenError, match="2 ranks"):
        Capacity((1, 2), last_N=(None,), scaling=1.0)
    for rank, last in ((0, None), (1, 0)):
        with pytest.raises(LichenError, match="client 0"):
            Capacity((rank,), last_N=(last,), scaling=1.0)
    with pytest.raises(LichenError, match="scaling"):
        Capacity((1,), last_N=(None,), scaling=0.0)
    with pytest.raises(LichenError, match="not among 1"):
        Capacity((1,), last_N=(None,), scaling=1.0).key(1)
    with pytest.raises(LichenError, match="no capacity"):
        Capacity((1,), last_N=(None,), scaling=1.0).extract(Shared(), "strong")
    shared = {**start(), "model.layers.2.q_proj.magnitude": torch.ones(6)}
    with pytest.raises(LichenError, match="no patch can hold"):
        cut(shared, 4, 1)
