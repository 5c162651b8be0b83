"""A random Llama of two layers with a tokenizer of its own, and what a few people said: all in local files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lichen.core.seeds import numpy_generator

WORDS = tuple(f"w{i}" for i in range(40))
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_model(
    folder: Path,
    *,
    without: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
    seed: int = 0,
    biases: bool = False,
    layers: int = 2,
) -> Path:
    """Write model and tokenizer as transformers does; ``without``: special tokens it lacks; ``more``: words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate((*SPECIAL.values(), "<user>", "<assistant>", *WORDS, *more))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    special = {kind: token for kind, token in SPECIAL.items() if kind not in without}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"] if "pad_token" in special else None,
        initializer_range=0.2,
        attention_bias=biases,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def say(rng: np.random.Generator, words: int) -> str:
    """So many random words."""
    return " ".join(rng.choice(WORDS, size=words))


def save_rows(file: Path, shape: Literal["pair", "messages", "label"], *, clients: int = 5, rows: int = 10) -> Path:
    """What ``clients`` people wrote; one of them in longer sentences, so that widths differ."""
    lines = []
    for c in range(clients):
        rng = numpy_generator(c, "rows")
        for row in range(rows):
            ask, answer = say(rng, 3), say(rng, 15 if c == 1 else 5)
            told: dict[str, Any] = {
                "pair": {"ask": ask, "reply": answer},
                "messages": {
                    "talk": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
                },
                "label": {"said": answer, "mood": ("calm", "glad", "sad")[(row + c) % 3]},
            }[shape]
            lines.append(json.dumps({"who": f"person-{c}", **told}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def recipe(model: Path, data: Path, shape: Literal["pair", "messages", "label"], /, **more: Any) -> dict[str, Any]:
    """A few rounds on them; ``more`` are whole sections, laid over these key by key."""
    columns = {
        "pair": {"client": "who", "prompt": "ask", "completion": "reply"},
        "messages": {"client": "who", "messages": "talk"},
        "label": {"client": "who", "text": "said", "label": "mood"},
    }[shape]
    sections: dict[str, Any] = {
        "name": "tiny",
        "task": "classify" if shape == "label" else "chat",
        "model": {"name": str(model), "adapter": {"target_modules": ["q_proj", "v_proj"], "rank": 2, "alpha": 4}},
        "data": {
            "name": str(data),
            "columns": columns,
            **({} if shape == "label" else {"form": "messages" if shape == "messages" else "transcript"}),
            "max_length": 32,
            "valid": 0.2,
            "test": 0.2,
        },
        "optimizer": {"lr": [0.02]},
        "federation": {"rounds": 3, "local_steps": 2, "batch_size": 4},
        "compare": {"baselines": []},
    }
    for name, section in more.items():
        sections[name] = {**sections.get(name, {}), **section} if isinstance(section, dict) else section
    return sections
