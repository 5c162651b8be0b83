"""A model from nothing: the same for the same seed, readable by everybody, and able to learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.core.errors import LichenError
from lichen.core.tree import digest
from lichen.data.batches.pack_rows import lm_rows
from lichen.models.loading.load import base_digest, load_causal
from lichen.models.students.scratch import END, PAD, Size, initial_model, save_scratch, train_tokenizer

TEXTS = tuple(
    f"The {a} {b} of the Union, {n} years after the {b} of a {a} nation: it's what the people's houses had asked for."
    for n, (a, b) in enumerate((a, b) for a in ("great", "small", "free", "young") for b in ("state", "war", "peace"))
)
SMALL = Size(32, layers=2, heads=2, context=64)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, vocabulary=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_scratch(tmp_path_factory.mktemp("scratch") / "model", SMALL, TEXTS, vocabulary=300, seed=5)


@settings(deadline=None, max_examples=80)
@given(text=st.text())
def test_every_text_comes_back(tokenizer: Any, text: Any) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= i < len(tokenizer) for i in ids)
    if END not in text and PAD not in text:
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_learns_and_repeats(tokenizer: Any) -> None:
    again = train_tokenizer(iter(TEXTS), vocabulary=300)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == 300
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert tokenizer.eos_token_id == tokenizer.bos_token_id != tokenizer.pad_token_id
    assert tokenizer.encode("war") == tokenizer.encode("war", add_special_tokens=False)


@pytest.mark.parametrize("size", [Size(), Size(48, layers=3, heads=3, inner=80), SMALL])
def test_the_number_of_parameters_is_foretold(tokenizer: Any, size: Any) -> None:
    model = initial_model(size, tokenizer, seed=0)
    assert sum(x.numel() for x in model.parameters()) == size.parameters(len(tokenizer))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_default_has_about_a_million() -> None:
    assert 0.9e6 < Size().parameters(2048) < 1.2e6


def test_weights_depend_on_the_seed_alone(tokenizer: Any) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = initial_model(SMALL, tokenizer, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert base_digest(one) == base_digest(initial_model(SMALL, tokenizer, seed=3))
    assert base_digest(one) != base_digest(initial_model(SMALL, tokenizer, seed=4))
    first, second = one.model.layers[0].self_attn, one.model.layers[1].self_attn
    assert float(first.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(second.o_proj.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert not torch.equal(first.q_proj.weight, second.q_proj.weight)
    assert torch.equal(one.model.norm.weight.detach(), torch.ones(32))


def test_the_folder_loads_as_any_other(folder: Path) -> None:
    model, tokenizer = load_causal(folder)
    fresh = initial_model(SMALL, train_tokenizer(TEXTS, vocabulary=300), seed=5)
    assert digest(dict(model.named_parameters())) == digest(dict(fresh.named_parameters()))
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert tokenizer.pad_token == PAD
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 64
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    said = model.generate(**tokenizer(TEXTS[0][:20], return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert said.shape[0] == 1


def test_saved_twice_it_is_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = save_scratch(tmp_path / "again", SMALL, TEXTS, vocabulary=300, seed=5)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()


def test_it_begins_at_chance_and_learns(folder: Path) -> None:
    model, tokenizer = load_causal(folder)
    shard = lm_rows(TEXTS, tokenizer, 32)
    ids = torch.tensor([row.tolist() for row in shard.input_ids])
    model.train().requires_grad_(True)
    stepper = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        stepper.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(300.0).log().item(), rel=0.02)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Size(30, heads=4),
        lambda: Size(layers=0),
        lambda: Size(inner=0),
        lambda: train_tokenizer(TEXTS, vocabulary=200),
    ],
)
def test_refuses_what_cannot_be_made(make: Any) -> None:
    with pytest.raises(LichenError, match=r"model\.scratch"):
        make()


def test_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LichenError, match="cannot write a model there"):
        save_scratch(tmp_path / "file", SMALL, TEXTS, vocabulary=300)
