"""Proxied logits: three models of transformers, row by row, are the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from lichen.core.errors import LichenError
from lichen.core.tree import Tree, expand, stack
from lichen.core.wire.shared import Shared
from lichen.models.adapters.lora import Lora
from lichen.models.causal_cohort import CausalCohort
from lichen.models.full import FullCausal
from lichen.models.tokens import proxied
from lichen.models.tokens.proxied import BIG_LOSS, FrozenLM, ProxiedLM
from lichen.models.whole import filled

WORDS, CLIENTS, ROWS, WIDTH = 30, 3, 4, 12


def llama(seed: int, *, vocabulary: int = WORDS, width: int = 16, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = LlamaForCausalLM(config)
    return made.requires_grad_(False).eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (CLIENTS, ROWS, WIDTH), generator=g)
    length = torch.randint(3, WIDTH + 1, (CLIENTS, ROWS, 1), generator=g)
    mask = (torch.arange(WIDTH) < length).long()
    labels = torch.where((mask == 1) & (torch.arange(WIDTH) >= 2), ids, -100)
    active = torch.tensor([True, False, True])
    return {"active_C": active, "input_ids_CBT": ids, "attention_mask_CBT": mask, "labels_CBT": labels}


def by_hand(rows: dict[str, torch.Tensor], client: int, big: Any, tuned: Any, untuned: Any) -> tuple[float, float, int]:
    """Losses of the sum of logits and of the large model's, and the number of tokens; each row by itself, unpadded."""
    z_sum = big_sum = 0.0
    count = 0
    for row in range(ROWS):
        length = int(rows["attention_mask_CBT"][client, row].sum())
        ids = rows["input_ids_CBT"][client, row, :length][None]
        label_T = rows["labels_CBT"][client, row, 1:length]
        big_TV, tuned_TV, untuned_TV = (model(input_ids=ids).logits[0, :-1].double() for model in (big, tuned, untuned))
        size = min(big_TV.shape[1], tuned_TV.shape[1])
        z_TV = big_TV[:, :size] + tuned_TV[:, :size] - untuned_TV[:, :size]
        z_sum += float(functional.cross_entropy(z_TV, label_T, ignore_index=-100, reduction="sum"))
        big_sum += float(functional.cross_entropy(big_TV, label_T, ignore_index=-100, reduction="sum"))
        count += int((label_T != -100).sum())
    return z_sum, big_sum, count


def moved(tree: Tree, seed: int) -> Tree:
    g = torch.Generator().manual_seed(seed)
    return {name: x + 0.1 * torch.randn(x.shape, generator=g) for name, x in tree.items()}


@pytest.mark.parametrize("vocabulary", [WORDS, WORDS + 10])
@pytest.mark.parametrize("small", [WORDS, WORDS + 6])
@pytest.mark.parametrize("whole", [True, False])
def test_losses_are_those_of_three_models_by_hand(vocabulary: int, small: int, whole: bool) -> None:
    untuned, big = llama(0, vocabulary=small), llama(1, vocabulary=vocabulary, width=24, layers=3)
    inner = (
        FullCausal(untuned, name="small")
        if whole
        else CausalCohort(untuned, adapter=Lora(targets=("q_proj",), rank=2, alpha=4), name="s")
    )
    each = [moved(inner.init(0), seed) for seed in range(CLIENTS)]
    before = inner.init(0)
    model, rows = ProxiedLM(inner, untuned=Shared(before), big=FrozenLM(big)), batch()
    sums = model.sums(stack(each), {}, rows)
    assert sums["count"].tolist()[1] == 0
    assert float(sums["loss_sum"][1]) == float(sums[BIG_LOSS][1]) == 0
    for client in (0, 2):
        tuned = filled(untuned, each[client]) if whole else joined(untuned, each[client])
        z, alone, count = by_hand(rows, client, big, tuned, untuned)
        assert float(sums["loss_sum"][client]) == pytest.approx(z, rel=1e-5)
        assert float(sums[BIG_LOSS][client]) == pytest.approx(alone, rel=1e-5)
        assert int(sums["count"][client]) == count
    loss_CB, count_CB = model.losses(stack(each), {}, rows)
    torch.testing.assert_close(loss_CB.sum(1), sums["loss_sum"], rtol=1e-5, atol=1e-6)
    assert count_CB.sum(1).tolist() == sums["count"].tolist()


def joined(model: Any, tensors: Tree) -> Any:
    from lichen.models.peft.merge import merge

    return merge(model, tensors, {}, spec=Lora(targets=("q_proj",), rank=2, alpha=4))


def test_chunks_and_a_head_that_is_not_plain_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, big = FullCausal(llama(0), name="small"), FrozenLM(llama(1))
    tuned_C = expand(moved(inner.init(0), 4), CLIENTS)
    model, rows = ProxiedLM(inner, untuned=Shared(inner.init(0)), big=big), batch()
    whole = model.sums(tuned_C, {}, rows)
    seen: list[int] = []
    plain = proxied.combined

    def counted(*logits: torch.Tensor) -> torch.Tensor:
        seen.append(max(len(x) for x in logits))
        return plain(*logits)

    monkeypatch.setattr(proxied, "combined", counted)
    monkeypatch.setattr(proxied, "LOGITS_BYTES", 4 * WORDS * 5)
    parts = model.sums(tuned_C, {}, rows)
    assert max(seen) == 5  # logits of no more places than that are held at once
    assert sum(seen) == int(whole["count"].sum())
    monkeypatch.setattr(FrozenLM, "_is_plain", lambda _: False)
    model.big = FrozenLM(big.model)
    capped = model.sums(tuned_C, {}, rows)
    for name in ("loss_sum", BIG_LOSS):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(capped[name], whole[name], rtol=1e-5, atol=1e-6)


def test_without_tuning_it_is_the_large_model_and_with_the_small_as_the_large_one_the_tuned() -> None:
    small, big = llama(0), llama(1)
    inner, rows = FullCausal(small, name="small"), batch()
    before = inner.init(0)
    sums = ProxiedLM(inner, untuned=Shared(before), big=FrozenLM(big)).sums(expand(before, CLIENTS), {}, rows)
    assert torch.equal(sums["loss_sum"], sums[BIG_LOSS])
    tuned_C = expand(moved(before, 3), CLIENTS)
    steered = ProxiedLM(inner, untuned=Shared(before), big=FrozenLM(small)).sums(tuned_C, {}, rows)
    torch.testing.assert_close(steered["loss_sum"], inner.loss(tuned_C, {}, rows)[0], rtol=1e-5, atol=1e-5)


def test_a_client_has_the_same_bits_in_any_company() -> None:
    inner, big = FullCausal(llama(0), name="small"), FrozenLM(llama(1))
    each = [moved(inner.init(0), seed) for seed in range(CLIENTS)]
    model, rows = ProxiedLM(inner, untuned=Shared(inner.init(0)), big=big), batch()
    together = model.sums(stack(each), {}, rows)
    alone = model.sums(stack(each[2:]), {}, {name: x[2:] for name, x in rows.items()})
    assert all(torch.equal(x, together[name][2:]) for name, x in alone.items())


def test_a_large_model_that_could_be_trained_and_whole_logits_are_refused() -> None:
    with pytest.raises(LichenError, match="training mode"):
        FrozenLM(llama(1).train())
    inner = FullCausal(llama(0), name="small")
    model = ProxiedLM(inner, untuned=Shared(inner.init(0)), big=FrozenLM(llama(1)))
    with pytest.raises(LichenError, match="never held whole"):
        model.logits(expand(inner.init(0), CLIENTS), {}, batch())
