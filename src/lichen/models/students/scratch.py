"""A language model from scratch: a small Llama drawn from a seed, with its own tokenizer.

Where a federation pre-trains instead of adapting, it needs a model that nobody has trained. The
architecture is Llama's with tied embeddings; the tokenizer is a byte-level BPE learned from given
texts, so that every text can be written in it and read back. Both are saved as one Hugging Face
folder, which the rest of Lichen, transformers, and every tool that knows Llama load by its path.

Whoever trains the tokenizer reads the texts: give it public ones, or those of one willing party.

References:
    Hugo Touvron et al. "LLaMA: Open and Efficient Foundation Language Models." 2023.
    https://arxiv.org/abs/2302.13971
    Alec Radford, Jeffrey Wu, Rewon Child, David Luan, Dario Amodei and Ilya Sutskever. "Language
    Models are Unsupervised Multitask Learners." 2019 (byte-level BPE; layers that write to the
    residual stream begin smaller by the root of their number).
    Ofir Press and Lior Wolf. "Using the Output Embedding to Improve Language Models." EACL 2017.
    https://arxiv.org/abs/1608.05859 (tied embeddings)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, final

import torch

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator

__all__ = ["Size", "initial_model", "save_scratch", "train_tokenizer"]

END, PAD = "<|end|>", "<|pad|>"
_BYTES = 256
_SPREAD = 0.02
_RESIDUAL = ("o_proj.weight", "down_proj.weight")


@final
@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is; by default one of about a million parameters with a vocabulary of 2048.

    Args:
        width: Size of a token's vector.
        layers: Blocks.
        heads: Attention heads; they divide the width into parts of even size.
        inner: Width of the feed-forward part; by default 8/3 of the width, rounded up to 16.
        context: Tokens it can look at.

    Raises:
        LichenError: if a number is not positive, or the heads do not divide the width.

    >>> Size().parameters(2048)
    1066112
    """

    width: int = 128
    _: KW_ONLY
    layers: int = 4
    heads: int = 4
    inner: int | None = None
    context: int = 128

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "inner", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise LichenError(f"{name} is {value}", where="model.scratch", fix="use a number above 0")
        if self.width % (2 * self.heads):
            raise LichenError(
                f"{self.heads} heads do not divide a width of {self.width} into parts of even size",
                where="model.scratch.heads",
                fix="make the width a multiple of twice the heads",
            )

    @property
    def feed(self) -> int:
        """Width of the feed-forward part."""
        return -(-self.width * 8 // 3 // 16) * 16 if self.inner is None else self.inner

    def parameters(self, vocabulary: int) -> int:
        """Numbers to train, the tied embedding once."""
        block = 4 * self.width**2 + 3 * self.width * self.feed + 2 * self.width
        return vocabulary * self.width + self.layers * block + self.width


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = 2048) -> Any:
    """A byte-level BPE tokenizer learned from ``texts``, the same for the same texts in the same order.

    Args:
        texts: What pairs are counted in.
        vocabulary: Tokens at most: bytes, an end token (also the start) and a padding token, and the
            merges that the texts give.

    Returns:
        A transformers tokenizer. Encoding and decoding give every text back.

    Raises:
        LichenError: if the vocabulary has no room for all bytes.
    """
    least = _BYTES + len((END, PAD))
    if vocabulary < least:
        raise LichenError(
            f"a vocabulary of {vocabulary} has no room for all bytes",
            where="model.scratch.vocabulary",
            fix=f"use at least {least}",
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    pairs.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=pairs, bos_token=END, eos_token=END, pad_token=PAD)


def initial_model(size: Size, tokenizer: Any, *, seed: int) -> Any:
    """An untrained ``LlamaForCausalLM`` for this tokenizer: the same bytes for the same seed.

    Matrices are normal with spread 0.02, those that write to the residual stream smaller by the root
    of their number; norms are one.

    Args:
        size: How large.
        tokenizer: From :func:`train_tokenizer`, or any other with an end and a padding token.
        seed: Each tensor is drawn from the seed and its name.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.feed,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        initializer_range=_SPREAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The constructor draws from torch's global generator; leave that as it was.
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    residual = _SPREAD / (2 * size.layers) ** 0.5
    with torch.no_grad():
        for name, x in model.named_parameters():
            if x.dim() == 1:
                x.fill_(1.0)
            else:
                spread = residual if name.endswith(_RESIDUAL) else _SPREAD
                x.copy_(torch.randn(x.shape, generator=torch_generator(seed, "scratch", name)) * spread)
    return model


def save_scratch(folder: Path, size: Size, texts: Iterable[str], *, vocabulary: int = 2048, seed: int = 0) -> Path:
    """Train a tokenizer, draw a model for it, and write both as a Hugging Face folder.

    Args:
        folder: Made where it does not exist; :func:`lichen.models.loading.load.load_causal` reads it.
        size: How large.
        texts: For the tokenizer.
        vocabulary: Tokens at most.
        seed: Seed of the weights.

    Returns:
        ``folder``.

    Raises:
        LichenError: as :func:`train_tokenizer`, or if the folder cannot be written.
    """
    tokenizer = train_tokenizer(texts, vocabulary=vocabulary)
    tokenizer.model_max_length = size.context
    model = initial_model(size, tokenizer, seed=seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise LichenError(
            f"cannot write a model there: {error.strerror}", where=str(folder), fix="name another folder"
        ) from None
    return folder
