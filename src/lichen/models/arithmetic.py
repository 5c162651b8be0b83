"""Counts floating-point operations of training and evaluation.

A weight that a token passes is multiplied once and added once: 2 operations forward, and 2 more backward for the
gradient of what went in. The gradient of the weight itself costs another 2, which a frozen weight does not need.
So, with N frozen and A adapter weights on the way of a token, O weights of the output layer, L·D = layers times
attention width, and rows of T tokens::

    forward   Σ tokens 2 (N + A) + Σ labelled 2 O            + Σ rows 4 L·D T²
    training  Σ tokens (4 N + 6 A) + Σ labelled 4 O          + Σ rows 12 L·D T²

The output layer of a language model sees labelled positions only, and attention is counted in full, without the
half that a causal mask could save. Norms, activations, embeddings and the optimizer are left out, and so is what
padding costs: this is the work that has to be done, not what one kernel makes of it.

References:
    Kaplan, McCandlish, Henighan, Brown, Chess, Child, Gray, Radford, Wu and Amodei (2020). Scaling Laws for
    Neural Language Models. arXiv:2001.08361, section 2.1 (2N forward, 4N backward).
    Chowdhery et al. (2022). PaLM: Scaling Language Modeling with Pathways. arXiv:2204.02311, appendix B
    (attention).
    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang and Chen (2022). LoRA: Low-Rank Adaptation of Large Language
    Models. ICLR 2022, arXiv:2106.09685 (no gradient of frozen weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, final

from lichen.core.conventions.factor_pairs import is_factor
from lichen.core.tree import Tree
from lichen.models.adapters.linear_layers import is_linear

__all__ = ["arithmetic_of"]

ONCE_A_ROW = ("classifier", "score", "pooler", "pre_classifier")
"""Parts of names of layers that see one position of a row."""


class Load(Protocol):
    """Rows without their padding."""

    @property
    def rows(self) -> float:
        """How many."""
        ...

    @property
    def tokens(self) -> float:
        """Of all rows."""
        ...

    @property
    def labelled(self) -> float:
        """Positions that the output layer sees."""
        ...

    @property
    def square(self) -> float:
        """Sum over rows of squared lengths."""
        ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """A transformer with a frozen base, by the weights on the way of a token, a label and a row.

    Attributes:
        token: Frozen weights every token passes (N).
        adapter: Trained weights every token passes (A).
        label: Frozen weights of the output layer (O).
        label_trained: Trained ones of it.
        row: Frozen weights passed once a row.
        row_trained: Trained ones.
        attention: Layers times attention width (L·D).
    """

    token: int
    adapter: int = 0
    label: int = 0
    label_trained: int = 0
    row: int = 0
    row_trained: int = 0
    attention: int = 0

    def forward(self, load: Load) -> float:
        """2 for each weight passed, and the attention."""
        passed = load.tokens * (self.token + self.adapter) + load.labelled * (self.label + self.label_trained)
        return 2.0 * (passed + load.rows * (self.row + self.row_trained)) + 4.0 * load.square * self.attention

    def train(self, load: Load) -> float:
        """4 for each frozen weight passed, 6 for each trained one, and thrice the attention."""
        frozen = load.tokens * self.token + load.labelled * self.label + load.rows * self.row
        own = load.tokens * self.adapter + load.labelled * self.label_trained + load.rows * self.row_trained
        return 4.0 * frozen + 6.0 * own + 12.0 * load.square * self.attention


def arithmetic_of(model: Any, start: Tree) -> Arithmetic:
    """Count a transformers model's weights by where they are used.

    Args:
        model: The foundation model.
        start: What is trained on it; empty for features alone.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    sizes = {"token": 0, "adapter": 0, "label": 0, "label_trained": 0, "row": 0, "row_trained": 0}
    for path, layer in model.named_modules():
        if not is_linear(layer):
            continue
        place = "label" if layer is output else "row" if any(p in ONCE_A_ROW for p in path.split(".")) else "token"
        trained = "adapter" if place == "token" else f"{place}_trained"
        sizes[trained if f"{path}.weight" in start else place] += layer.weight.numel()
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_attention_heads", 0))
    width = heads * int(getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    sizes["adapter"] += sum(x.numel() for name, x in start.items() if is_factor(name))
    return Arithmetic(
        **sizes,
        attention=int(getattr(config, "num_hidden_layers", 0)) * width,
    )
