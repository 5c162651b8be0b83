"""Tiny random models of many architectures, to hold what is said of *any* model against more than one."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY, CLASSES = 97, 3


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a tiny model of an architecture is made, and what its layers are called.

    Attributes:
        model: Name of the transformers class.
        config: Name of its configuration.
        sizes: What is set there.
        targets: Linear layers that are adapted.
        feedforward: Linear layers whose input IA3 scales.
        blocks: The list of its blocks.
        head: What is trained whole; empty for language models.
    """

    model: str
    config: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    feedforward: tuple[str, ...]
    blocks: str
    head: tuple[str, ...] = ()

    @property
    def task(self) -> str:
        return "SEQ_CLS" if self.head else "CAUSAL_LM"


_WIDE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_LLAMA = {**_WIDE, **_TOKENS, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = {**_WIDE, "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": CLASSES, "pad_token_id": 0}
_QV, _ACROSS = ("q_proj", "v_proj"), ("down_proj",)


def _llama(name: str, **more: Any) -> Family:
    return Family(
        model=f"{name}ForCausalLM",
        config=f"{name}Config",
        sizes={**_LLAMA, **more},
        targets=_QV,
        feedforward=_ACROSS,
        blocks="layers",
    )


def _bert(
    name: str, *, targets: tuple[str, ...] = ("query", "value"), feed: str = "output.dense", **more: Any
) -> Family:
    return Family(
        model=f"{name}ForSequenceClassification",
        config=f"{name}Config",
        sizes={**_BERT, **more},
        targets=targets,
        feedforward=(feed,),
        blocks=more.pop("blocks", "layer"),
        head=("classifier",),
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama("Llama"),
    "qwen2": _llama("Qwen2", tie_word_embeddings=True),
    "qwen3": _llama("Qwen3", head_dim=8),
    "mistral": _llama("Mistral"),
    "gemma": _llama("Gemma", head_dim=8),
    "gemma2": _llama("Gemma2", head_dim=8),
    "olmo2": _llama("Olmo2"),
    "phi": Family(
        model="PhiForCausalLM",
        config="PhiConfig",
        sizes={**_LLAMA, "num_key_value_heads": 4},
        targets=_QV,
        feedforward=("fc2",),
        blocks="layers",
    ),
    "phi3": Family(
        model="Phi3ForCausalLM",
        config="Phi3Config",
        sizes=_LLAMA,
        targets=("qkv_proj", "o_proj"),
        feedforward=_ACROSS,
        blocks="layers",
    ),
    "gpt2": Family(
        model="GPT2LMHeadModel",
        config="GPT2Config",
        sizes={"vocab_size": VOCABULARY, **_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        targets=("c_attn",),
        feedforward=("mlp.c_proj",),
        blocks="h",
    ),
    "gpt-neox": Family(
        model="GPTNeoXForCausalLM",
        config="GPTNeoXConfig",
        sizes={**_WIDE, **_TOKENS, "intermediate_size": 48, "max_position_embeddings": 64},
        targets=("query_key_value",),
        feedforward=("dense_4h_to_h",),
        blocks="layers",
    ),
    "opt": Family(
        model="OPTForCausalLM",
        config="OPTConfig",
        sizes={**_WIDE, **_TOKENS, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
        targets=_QV,
        feedforward=("fc2",),
        blocks="layers",
    ),
    "bloom": Family(
        model="BloomForCausalLM",
        config="BloomConfig",
        sizes={"vocab_size": VOCABULARY, **_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        targets=("query_key_value",),
        feedforward=("dense_4h_to_h",),
        blocks="h",
    ),
    "falcon": Family(
        model="FalconForCausalLM",
        config="FalconConfig",
        sizes={**_WIDE, **_TOKENS, "ffn_hidden_size": 48, "max_position_embeddings": 64},
        targets=("query_key_value",),
        feedforward=("dense_4h_to_h",),
        blocks="h",
    ),
    "llama-classifier": Family(
        model="LlamaForSequenceClassification",
        config="LlamaConfig",
        sizes={**_LLAMA, "num_labels": CLASSES},
        targets=_QV,
        feedforward=_ACROSS,
        blocks="layers",
        head=("score",),
    ),
    "bert": _bert("Bert"),
    "roberta": _bert("Roberta"),
    "electra": _bert("Electra", embedding_size=16),
    "deberta-v2": _bert(
        "DebertaV2",
        targets=("query_proj", "value_proj"),
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
    ),
    "distilbert": Family(
        model="DistilBertForSequenceClassification",
        config="DistilBertConfig",
        sizes={
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "num_labels": CLASSES,
            "pad_token_id": 0,
        },
        targets=("q_lin", "v_lin"),
        feedforward=("lin2",),
        blocks="layer",
        head=("pre_classifier", "classifier"),
    ),
    "modernbert": Family(
        model="ModernBertForSequenceClassification",
        config="ModernBertConfig",
        sizes={**_BERT, **_TOKENS, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
        targets=("Wqkv",),
        feedforward=("mlp.Wo",),
        blocks="layers",
        head=("classifier",),
    ),
}


@functools.cache
def made(name: str) -> Any:
    """The family's model, frozen, in evaluation mode; everyone gets the same one and must leave it as it is."""
    import transformers as hf

    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, family.model)(getattr(hf, family.config)(**family.sizes))
        for parameter in model.parameters():  # far from zero, so that a difference would be seen
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.requires_grad_(False).eval()


def rows(*, padded: bool = True) -> dict[str, torch.Tensor]:
    """Two rows, one of them padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(4, VOCABULARY, (2, 9), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    if padded:
        ids_BT[1, 6:], mask_BT[1, 6:] = 0, 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
