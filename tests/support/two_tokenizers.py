"""Two random little language models with tokenizers of their own, and texts that both can read."""

from __future__ import annotations

from functools import cache
from typing import Any

from lichen.core.seeds import numpy_generator
from lichen.models.students.scratch import Size, initial_model, train_tokenizer

SENTENCE = "the cat sat on a mat and then the other cats were sitting under some old trees near our house"
WORDS = tuple(SENTENCE.split())


def say(seed: int, words: int) -> str:
    return " ".join(numpy_generator(seed, "say").choice(WORDS, size=words))


TEXTS = tuple(say(i, 6 + i % 3) for i in range(8))


@cache
def tokenizer(vocabulary: int) -> Any:
    """Byte-level BPE: the larger the vocabulary, the longer its tokens."""
    return train_tokenizer([say(100 + i, 12) for i in range(40)], vocabulary=vocabulary)


@cache
def model(vocabulary: int, seed: int = 0) -> Any:
    """A random Llama for it, far enough from uniform that it has something to say."""
    import torch

    made = (
        initial_model(Size(16, layers=1, heads=2, context=64), tokenizer(vocabulary), seed=seed)
        .requires_grad_(False)
        .eval()
    )
    with torch.no_grad():
        made.get_input_embeddings().weight.mul_(8.0)
    return made
