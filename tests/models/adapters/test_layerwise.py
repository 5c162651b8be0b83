"""Blocks in turns: who stands still when, and what that saves.

Legend: C clients.
"""

from __future__ import annotations

from typing import Any

import equality
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lichen.clients.training.train import Train
from lichen.core.errors import LichenError
from lichen.core.message import Job
from lichen.core.tree import block_of
from lichen.core.wire.shared import Shared
from lichen.models.adapters.layerwise import layerwise_schedule
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.recipes.assemble.live_bytes import LiveBytes


def _names(blocks: list[int]) -> list[str]:
    return [f"model.layers.{b}.q_proj.lora_{side}" for b in blocks for side in "AB"] + ["score.weight"]


@given(
    blocks=st.sets(st.integers(0, 40), min_size=1, max_size=20),
    groups=st.integers(1, 20),
    order=st.sampled_from(["up", "down"]),
)
def test_every_block_has_its_turn(blocks: set[int], groups: int, order: Any) -> None:
    names, groups = _names(sorted(blocks)), min(groups, len(blocks))
    freeze_schedule = layerwise_schedule(names, groups, order)
    assert len(freeze_schedule) == groups
    trained = [[n for n in names if not n.endswith(frozen)] if frozen else names for frozen in freeze_schedule]
    turns = [[b for n in turn if n.endswith("lora_A") and (b := block_of(n)) is not None] for turn in trained]
    assert sorted(b for turn in turns for b in turn) == sorted(blocks)
    assert max(map(len, turns)) - min(map(len, turns)) <= 1
    flat = [b for turn in (turns if order == "up" else turns[::-1]) for b in turn]
    assert flat == sorted(blocks)
    assert all("score.weight" in turn for turn in trained)


def test_too_many_groups() -> None:
    with pytest.raises(LichenError, match="use 1 to 2"):
        layerwise_schedule(_names([0, 1]), 3)
    with pytest.raises(LichenError, match="lies in no block"):
        layerwise_schedule(["score.weight"], 1)


def _model(blocks: int) -> Any:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=equality.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(config).requires_grad_(False).eval()


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 34).view(1, 2, 16)
    return {
        "active_C": torch.ones(1, dtype=torch.bool),
        "input_ids_CBT": ids,
        "attention_mask_CBT": torch.ones_like(ids),
        "labels_CBT": ids,
    }


def _fold(work: Train, shared: dict[str, torch.Tensor], version: int) -> tuple[int, set[str]]:
    """Bytes a step makes at most, and which tensors changed."""
    job = Job(work="train", shared=Shared.of_flat(shared), version=version, clients=(0,), seed=0, base=work.model.base)
    with LiveBytes() as live:
        message, _ = work.final(work.step(work.init(job, (0,), None), _batch()))
    return live.peak, {name for name, x in message.tensors.items() if bool(x.any())}


@pytest.mark.parametrize("padded", [True, False])
def test_a_phase_trains_its_blocks_alone_and_costs_less(padded: bool) -> None:
    cohort = CausalCohort(_model(8), adapter=Lora(targets=("q_proj", "v_proj"), rank=2), name="x", reference=padded)
    shared = {n: x + 0.01 for n, x in cohort.init(0).items()}
    freeze_schedule = layerwise_schedule(shared, 4, "up")
    work = Train(cohort, freeze_schedule=freeze_schedule)
    peaks = []
    for version in range(5):
        peak, changed = _fold(work, shared, version)
        assert changed == {n for n in shared if block_of(n) in (2 * (version % 4), 2 * (version % 4) + 1)}
        peaks.append(peak)
    whole, changed = _fold(Train(cohort), shared, 0)
    assert changed == set(shared)
    # The way back ends below the lowest block that is trained: each group of two higher up keeps two blocks fewer.
    assert whole > peaks[0] > peaks[1] > peaks[2] > peaks[3]
    assert whole > 2.5 * peaks[3]
    assert peaks[4] == peaks[0]


@pytest.mark.parametrize("padded", [True, False])
def test_checkpointing_gives_the_same_gradients(padded: bool) -> None:
    """Also where the adapters of some blocks stand still: they are put in again on the way back."""
    cohort = CausalCohort(_model(4), adapter=Lora(targets=("q_proj", "v_proj"), rank=2), name="x", reference=padded)
    shared = {n: x + 0.01 for n, x in cohort.init(0).items()}
    frozen = set(layerwise_schedule(shared, 2)[0])
    found, peaks = [], []
    for model in (cohort, cohort.checkpointed()):
        trainable_C = {n: x[None].clone().requires_grad_(n not in frozen) for n, x in shared.items()}
        leaves = [x for x in trainable_C.values() if x.requires_grad]
        with LiveBytes() as live:
            loss_C, _ = model.loss(trainable_C, {}, _batch())
            found.append([loss_C.detach(), *torch.autograd.grad(loss_C.sum(), leaves)])
        peaks.append(live.peak)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(g.any()) for g in found[0])
    assert peaks[1] < peaks[0]
