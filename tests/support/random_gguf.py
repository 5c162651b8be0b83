"""A random Llama of two layers as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

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
