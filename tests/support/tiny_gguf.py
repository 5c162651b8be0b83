"""Tiny random language models with byte-level tokenizers, of the architectures that are written as GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from lichen.core.seeds import torch_generator

TEXT = (
    "What grows on the north side of a stone? The moss, of course, and the lichen beside it, all 12,345 of them.",
    "It's only a stone; isn't it?  Two  blanks, a tab\there, naïve café, это лишайник, and 苔は石の上に育つ.",
)
MERGES = ("h e", "Ġ t", "Ġt he", "s t", "o n", "on e", "Ġ st", "Ġst one", "Ġ o", "Ġo f", "l i", "li c", "lic he", "1 2")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"family": "Llama", "split": "smollm", "num_key_value_heads": 2},
    "llama-tied": {"family": "Llama", "split": "gpt-2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-scaled": {
        "family": "Llama",
        "split": "llama-bpe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": LLAMA3,
    },
    "qwen2": {"family": "Qwen2", "split": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen2-tied": {"family": "Qwen2", "split": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"family": "GPT2", "split": "gpt-2"},
}


def tokenizer_of(split: str) -> Any:
    """A byte-level tokenizer that cuts texts as the name says in llama.cpp."""
    from transformers import PreTrainedTokenizerFast

    pairs = [(one, other) for one, _, other in (merge.partition(" ") for merge in MERGES)]
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    elif split in SPLITS:
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"), whole])
    else:
        inner.pre_tokenizer = plain
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=SPECIAL[1], eos_token=SPECIAL[2], pad_token=SPECIAL[2], unk_token=SPECIAL[0]
    )
    made.chat_template = TEMPLATE
    return made


def model_of(kind: str, *, seed: int = 0, scale: float = 0.1, vocabulary: int | None = None) -> tuple[Any, Any]:
    """``(model, tokenizer)``, the model frozen; rows of the matrices divide by 32 but those of the way down."""
    import transformers as hf

    about = dict(KINDS[kind])
    family, tokenizer = about.pop("family"), tokenizer_of(about.pop("split"))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": vocabulary or len(tokenizer) + 2}
    if family == "GPT2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
        sizes |= {"intermediate_size": 112}
    made = getattr(hf, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    model = made(getattr(hf, f"{family}Config")(**sizes, **special, **about))
    for name, x in model.named_parameters():  # far from zero and one, so that an exchanged row would be seen
        x.data = scale * torch.randn(x.shape, generator=torch_generator(seed, name)) + (
            x.ndim == 1 and name.endswith("weight")
        )
    return model.requires_grad_(False).eval(), tokenizer


def save(kind: str, folder: Path) -> Path:
    """The model's folder, as transformers writes it."""
    model, tokenizer = model_of(kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
