"""Tiny random checkpoints of many families, saved as language models: without what is a classifier's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 61
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
_LATE = {**_SMALL, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DEBERTA = {
    **_SMALL,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}

FAMILIES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "bert": ("Bert", "ForMaskedLM", _SMALL, ("query", "value")),
    "distilbert": (
        "DistilBert",
        "ForMaskedLM",
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "initializer_range": 0.2},
        ("q_lin", "lin1"),
    ),
    "deberta-v2": (
        "DebertaV2",
        "ForMaskedLM",
        {**_DEBERTA, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        ("value_proj", "dense"),
    ),
    "deberta": ("Deberta", "ForMaskedLM", _DEBERTA, ("in_proj",)),
    "roberta": ("Roberta", "ForMaskedLM", _LATE, ("query", "dense")),
    "electra": ("Electra", "ForPreTraining", {**_SMALL, "embedding_size": 16}, ("query", "value")),
    "modernbert": (
        "ModernBert",
        "Model",
        {**_SMALL, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 1},
        ("Wqkv", "Wo"),
    ),
    "xlnet": (
        "XLNet",
        "LMHeadModel",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "pad_token_id": 0},
        ("layer_1", "layer_2"),
    ),
    "mpnet": ("MPNet", "ForMaskedLM", _LATE, ("q", "v")),
    "albert": ("Albert", "ForMaskedLM", {**_SMALL, "embedding_size": 8}, ("query", "ffn")),
    "funnel": (
        "Funnel",
        "ForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
        },
        ("q_head", "linear_1"),
    ),
    "llama": ("Llama", "ForCausalLM", {**_SMALL, "num_key_value_heads": 1}, ("q_proj", "v_proj")),
    "qwen2": ("Qwen2", "ForCausalLM", {**_SMALL, "num_key_value_heads": 1}, ("q_proj", "down_proj")),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        ("c_attn",),
    ),
    "t5": ("T5", "ForConditionalGeneration", _T5, ("q", "v")),
    "bart": (
        "Bart",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "decoder_start_token_id": 1,
            "forced_eos_token_id": 1,
        },
        ("q_proj", "fc1"),
    ),
}
"""``{family: (beginning of its class names, what is saved, its size, layers to adapt)}``."""


def save_bare(family: str, folder: Path, **more: Any) -> Path:
    """A model of this family without a classifier's own layers, and a tokenizer of numbered words."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    begin, end, size, _ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(hf, f"{begin}Config")(**{**size, **more})
        getattr(hf, f"{begin}{end}")(config).save_pretrained(folder)
    pad, eos = config.pad_token_id or 0, getattr(config, "eos_token_id", None)
    eos = eos if isinstance(eos, int) else 2
    words = {f"w{i}": i for i in range(VOCABULARY)}
    words = {"<pad>" if i == pad else "</s>" if i == eos else word: i for word, i in words.items()}
    made = Tokenizer(WordLevel(words, unk_token="w9"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w9", pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return folder
