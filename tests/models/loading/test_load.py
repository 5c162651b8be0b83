"""Loading from a folder: frozen, seeded heads, safetensors only, and one clear sentence for what is wrong."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from lichen.core.errors import LichenError
from lichen.models.features import EncoderFeatures
from lichen.models.loading.classifier import load_classifier
from lichen.models.loading.load import base_digest, load_causal, load_encoder
from support.tiny_llama import save_model


def _tokenizer(folder: Path, **special: str) -> None:
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special).save_pretrained(folder)


def _bert(kind: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **more
    )
    return kind(config)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    _bert(hf.BertModel).save_pretrained(folder)
    _tokenizer(folder, pad_token="<pad>")
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    _tokenizer(folder, eos_token="</s>")
    return folder


def test_causal_is_frozen_and_its_end_token_pads(gpt2: Path) -> None:
    model, tokenizer = load_causal(gpt2)
    assert not model.training
    assert not any(x.requires_grad for x in model.parameters())
    assert tokenizer.pad_token == "</s>"
    assert model.config._attn_implementation == "sdpa"
    assert load_causal(str(gpt2), dtype="float64")[0].dtype == torch.float64
    assert base_digest(model) == base_digest(load_causal(gpt2)[0])


def test_a_fresh_head_follows_from_the_seed_alone(bert: Path) -> None:
    torch.manual_seed(1)
    one = load_classifier(bert, classes=4, seed=7)[0]
    expected = torch.rand(1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(1), expected), "torch's global generator moved"
    torch.manual_seed(2)
    same, other = load_classifier(bert, classes=4, seed=7)[0], load_classifier(bert, classes=4, seed=8)[0]
    assert base_digest(one) == base_digest(same)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert one.classifier.weight.shape == (4, 16)
    assert 0.01 < float(one.classifier.weight.std()) < 0.03
    assert float(one.classifier.bias.abs().max()) == 0


def test_a_saved_head_is_kept_where_it_fits_and_drawn_anew_where_not(tmp_path: Path) -> None:
    saved = _bert(hf.BertForSequenceClassification, num_labels=3)
    saved.save_pretrained(tmp_path)
    _tokenizer(tmp_path, pad_token="<pad>")
    kept, drawn = (load_classifier(tmp_path, classes=k, seed=0)[0] for k in (3, 5))
    assert torch.equal(kept.classifier.weight, saved.classifier.weight)
    assert drawn.classifier.weight.shape == (5, 16)


def test_what_does_not_fit_is_said_in_one_sentence(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="no such folder"):
        load_causal(tmp_path / "nowhere")
    with pytest.raises(LichenError, match="cannot read a model"):
        load_causal(tmp_path)
    with pytest.raises(LichenError, match="is a bert, not a causal language model"):
        load_causal(bert)
    with pytest.raises(LichenError, match="no dtype 'int7'"):
        load_causal(gpt2, dtype="int7")
    with pytest.raises(LichenError, match="at least 2"):
        load_classifier(bert, classes=1, seed=0)
    _bert(hf.BertModel).save_pretrained(tmp_path)
    _tokenizer(tmp_path)
    with pytest.raises(LichenError, match="no pad token"):
        load_encoder(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(LichenError, match="cannot load the weights"):
        load_encoder(tmp_path)


def test_weights_of_another_shape_of_model_are_refused(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    _tokenizer(tmp_path, pad_token="<pad>")
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((gpt2 / "model.safetensors").read_bytes())
    with pytest.raises(LichenError, match="lacks weights such as"):
        load_encoder(tmp_path)
    with pytest.raises(LichenError, match="lacks weights such as"):
        load_classifier(tmp_path, classes=2, seed=0)


def test_an_output_layer_that_the_files_lack_is_not_drawn_unless_it_is_the_embedding(tmp_path: Path) -> None:
    size: dict[str, Any] = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for tied in (True, False):
        folder = tmp_path / str(tied)
        hf.LlamaModel(hf.LlamaConfig(**size, tie_word_embeddings=tied)).save_pretrained(folder)
        _tokenizer(folder, eos_token="</s>")
    load_causal(tmp_path / "True")
    with pytest.raises(LichenError, match=r"lacks weights such as 'lm_head\.weight'"):
        load_causal(tmp_path / "False")


def test_a_left_over_gguf_mark_is_dropped(gpt2: Path, tmp_path: Path) -> None:
    for file in gpt2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((gpt2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gguf"}}))
    model, _ = load_causal(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    assert base_digest(model) == base_digest(load_causal(gpt2)[0])


def test_features_are_means_and_each_row_stands_alone(bert: Path) -> None:
    model, _ = load_encoder(bert)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(31, (2, 3, 9), generator=generator)
    length = torch.tensor([[9, 4, 1], [6, 9, 2]])
    mask = (torch.arange(9) < length[..., None]).long()
    features = EncoderFeatures(model)
    all_CBH = features({"input_ids_CBT": ids, "attention_mask_CBT": mask})
    assert all_CBH.shape == (2, 3, features.width)
    assert all_CBH.dtype == torch.float32
    for c in range(2):
        for b in range(3):
            n = int(length[c, b])
            slow = model(input_ids=ids[c, b : b + 1, :n]).last_hidden_state[0].mean(0)
            torch.testing.assert_close(all_CBH[c, b], slow, rtol=1e-5, atol=1e-6)
            alone = features.rows(ids[c, b : b + 1, : n + 0], mask[c, b : b + 1, :n])
            assert alone[0].numpy().tobytes() == all_CBH[c, b].numpy().tobytes()
    fast = EncoderFeatures(model, reference=False, normalize=True)
    torch.testing.assert_close(
        fast.rows(ids[0], mask[0]), torch.nn.functional.normalize(all_CBH[0], dim=-1), rtol=1e-5, atol=1e-6
    )
    assert float(features.rows(ids[0], torch.zeros_like(mask[0])).abs().max()) == 0


def test_weights_in_their_stored_dtype_are_mapped_and_not_copied(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux")
    folder = save_model(tmp_path / "model")
    held, _ = load_causal(folder)
    assert str(folder / "model.safetensors") in maps.read_text(encoding="utf-8")
    before = base_digest(held)
    del held
    gc.collect()
    assert str(folder / "model.safetensors") not in maps.read_text(encoding="utf-8")
    converted, _ = load_causal(folder, dtype="bfloat16")
    mapped = maps.read_text(encoding="utf-8")  # the file is let go of once converted
    assert str(folder / "model.safetensors") not in mapped
    assert base_digest(converted) != before
    assert base_digest(load_causal(folder)[0]) == before
