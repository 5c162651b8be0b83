"""Two tiny language models whose weights are written by hand, and rows of preferences for them.

Nothing is drawn, so that the numbers that another package has computed of them hold with every version of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMES = ("llama", "gpt2")
VOCABULARY = 23

_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
}


def by_hand(name: str) -> Any:
    """A model, frozen, in evaluation mode, whose weights are sines of their places."""
    import transformers as hf

    kinds: dict[str, Any] = {
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config),
    }
    model, config = kinds[name]
    made = model(config(**_SIZES[name], pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for at, (key, x) in enumerate(sorted(made.named_parameters())):
            center = 1.0 if x.dim() == 1 and "weight" in key else 0.0
            x.copy_(center + _wave(x.shape, 0.37 + 0.11 * at, 0.2))
    return made.requires_grad_(False).eval()


def _wave(shape: torch.Size, step: float, height: float) -> Tensor:
    place = torch.arange(shape.numel(), dtype=torch.float64)
    return (height * torch.sin(step * place + step)).view(shape).float()


def weights_of(model: Any) -> dict[str, Tensor]:
    """The model's own tensors by name."""
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that training could have made of these."""
    return {name: x + _wave(x.shape, 0.73 + 0.05 * at, 0.02) for at, (name, x) in enumerate(sorted(weights.items()))}


def rows_of(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[bool]]:
    """``(first, second, good)``: four rows with two answers each, ``input_ids``, ``attention_mask`` and ``labels``.

    For ``orpo`` prompts are one token long and first answers equally long: TRL's likelihood of an answer counts the
    prompt, and is of all tokens of a batch; so this is where the two are the same.
    """
    prompts = [[1], [1], [1], [1]] if kind == "orpo" else [[1, 4, 5], [1, 6, 7], [1, 8, 9], [1, 3, 10]]
    first = [[11, 12, 13, 2], [14, 15, 16, 2], [17, 18, 5, 2], [19, 20, 6, 2]]
    if kind != "orpo":
        first[1], first[2] = [14, 2], [17, 18, 5, 7, 21, 2]
    second = [[5, 6, 2], [7, 8, 9, 10, 2], [21, 22, 2], [3, 4, 14, 2]]
    if kind == "kto":  # each prompt with the next row's answer
        second = [*first[1:], first[0]]
    return _laid(prompts, first), _laid(prompts, second), [True, False, True, True]


def _laid(prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Tensor]:
    width = 10
    ids, mask, labels = (torch.full((len(prompts), width), fill) for fill in (0, 0, -100))
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor([*prompt, *answer])
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
