"""A folder with nothing but a GGUF file is a model like any other."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lichen.core.errors import LichenError
from lichen.data.sources.cache_listing import items
from lichen.data.sources.catalog import resolve_model
from lichen.models.loading.load import load_causal

gguf: Any = pytest.importorskip("gguf")
WIDTH, BLOCKS, HEADS, FEED = 32, 2, 4, 64


def save_gguf(file: Path, *, kind: str = "F32", architecture: str = "llama") -> None:
    """A random Llama with a byte-level tokenizer."""
    from gguf.quants import quantize
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(str(file), architecture)
    words = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "ll"]
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] + [1] * (len(words) - 1))
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    rng, of = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]

    def add(name: str, *shape: int) -> None:
        x = (0.2 * rng.normal(size=shape)).astype(np.float32) if len(shape) > 1 else np.ones(shape, np.float32)
        writer.add_tensor(
            f"{name}.weight", quantize(x, of) if len(shape) > 1 else x, raw_dtype=of if len(shape) > 1 else None
        )

    add("token_embd", len(words), WIDTH)
    add("output_norm", WIDTH)
    add("output", len(words), WIDTH)
    for block in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}", WIDTH, WIDTH)
        add(f"blk.{block}.ffn_gate", FEED, WIDTH)
        add(f"blk.{block}.ffn_up", FEED, WIDTH)
        add(f"blk.{block}.ffn_down", WIDTH, FEED)
        add(f"blk.{block}.attn_norm", WIDTH)
        add(f"blk.{block}.ffn_norm", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LICHEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("kind", "bound"), [("F32", 0.0), ("Q8_0", 2e-2)])
def test_a_gguf_file_is_read_once_with_the_logits_that_transformers_gives(
    kind: str, bound: float, tmp_path: Path, cache: Path
) -> None:
    import transformers as hf

    (tmp_path / "own").mkdir()
    save_gguf(tmp_path / "own" / "tiny.gguf", kind=kind)
    said: list[str] = []
    folder = resolve_model(str(tmp_path / "own"), say=said.append)
    assert resolve_model(str(tmp_path / "own" / "tiny.gguf"), say=said.append) == folder
    assert len(said) == 1
    model, tokenizer = load_causal(folder)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "own", gguf_file="tiny.gguf").eval()
    ids = torch.tensor([tokenizer("hello you").input_ids])
    assert tokenizer.decode(ids[0]) == "hello you"
    with torch.no_grad():
        assert float((model(ids).logits - plain(ids).logits).abs().max()) <= bound
    assert [item.what for item in items(cache)] == ["a model read from a GGUF file"]
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_several_unknown_and_damaged_files_are_told(tmp_path: Path, cache: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    save_gguf(own / "a.gguf")
    whole = (own / "a.gguf").read_bytes()
    (own / "b.gguf").write_bytes(whole)
    with pytest.raises(LichenError, match=r"holds 2 GGUF files(.|\n)*a\.gguf"):
        resolve_model(str(own))
    save_gguf(own / "b.gguf", architecture="nonesuch")
    with pytest.raises(LichenError, match=r"b\.gguf: cannot read the GGUF file: .*nonesuch"):
        resolve_model(str(own / "b.gguf"))
    rng = random.Random(0)
    for damaged in (
        b"",
        b"GGUF",
        b"nonsense" * 99,
        whole[:900],
        whole[: len(whole) // 2],
        whole[:20] + rng.randbytes(999),
    ):
        (own / "b.gguf").write_bytes(damaged)
        with pytest.raises(LichenError, match=r"b\.gguf: cannot read the GGUF file: ."):
            resolve_model(str(own / "b.gguf"))
    assert not list(cache.glob("*")), "nothing is left of them"
