"""Token recovery: how much of a text whoever sees its hidden states at a cut of the model can read back.

Two readers, neither of which has seen the rows. *Nearest*: the token whose embedding has the largest cosine with a
state. *Linear*: states of tokens that the reader knows, made by the same frozen blocks, are regressed on the tokens'
embeddings (ridge, closed form); a token's score is the log density of the state around what its embedding predicts,
with one covariance for all, which is linear in the state (linear discriminant). Because the means follow from
embeddings, a token that never came in the known text can be read as well; random tokens will do for known text, so
that a reader needs nothing but the blocks.

Both are lower bounds: a reader that looks at neighbouring states, or has a language model, reads no less.

References:
    Dario Pasquini, Giuseppe Ateniese and Massimo Bernaschi. "Unleashing the Tiger: Inference Attacks on Split
    Learning." CCS 2021. https://arxiv.org/abs/2012.02670
    Congzheng Song and Ananth Raghunathan. "Information Leakage in Embedding Models." CCS 2020.
    https://arxiv.org/abs/2004.00053 (inversion of states)
    Ronald A. Fisher. "The Use of Multiple Measurements in Taxonomic Problems." Annals of Eugenics 7(2), 1936.
    Arthur E. Hoerl and Robert W. Kennard. "Ridge Regression: Biased Estimation for Nonorthogonal Problems."
    Technometrics 12(1), 1970.

Legend: N tokens, H width of a state, E width of an embedding, V vocabulary, B rows, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.seeds import torch_generator

__all__ = ["Recovery", "fit_decoder", "nearest_tokens", "random_rows", "token_recovery"]

RIDGE = 1e-2
"""Of the regression, relative to the mean square of an embedding's number."""

SHRINK = 1e-3
"""Added to the covariance's diagonal, relative to its mean."""

ABREAST = 512
"""States that are compared with the whole vocabulary at once."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDecoder:
    """A linear decoder of states.

    Attributes:
        mean_H: Of the known states.
        scale_H: Their standard deviations.
        weight_VH: Of each token, for standardised states.
        bias_V: Of each token.
    """

    mean_H: Tensor
    scale_H: Tensor
    weight_VH: Tensor
    bias_V: Tensor

    def tokens(self, state_NH: Tensor) -> Tensor:
        """The token with the highest score of each state, int64 ``(N,)``."""
        standard_NH = ((state_NH.double() - self.mean_H) / self.scale_H).float()
        return _best(standard_NH, self.weight_VH, self.bias_V)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What was read back.

    Attributes:
        tokens: N that were to be read.
        nearest: Share that the nearest embedding recovers.
        linear: Share that the linear decoder recovers.
        constant: Share that always naming their most frequent token recovers: what seeing nothing gives.
    """

    tokens: int
    nearest: float
    linear: float
    constant: float


def nearest_tokens(state_NH: Tensor, embedding_VH: Tensor) -> Tensor:
    """The token whose embedding has the largest cosine with each state, int64 ``(N,)``.

    Raises:
        LichenError: if states and embeddings differ in width.

    >>> nearest_tokens(torch.tensor([[0.0, 3.0]]), torch.eye(2))
    tensor([1])
    """
    if state_NH.shape[1] != embedding_VH.shape[1]:
        raise LichenError(
            f"states of width {state_NH.shape[1]} and embeddings of width {embedding_VH.shape[1]} have no cosine",
            where="split-audit",
            fix="use the linear decoder",
        )
    unit_VH = torch.nn.functional.normalize(embedding_VH.float(), dim=-1)
    return _best(state_NH.float(), unit_VH, unit_VH.new_zeros(len(unit_VH)))


def fit_decoder(
    state_NH: Tensor, token_N: Tensor, embedding_VE: Tensor, *, ridge: float = RIDGE, shrink: float = SHRINK
) -> TokenDecoder:
    """A linear decoder from states of known tokens.

    With standardised states ``h = A (e - ē) + u``, ``A`` by ridge regression and ``S`` the covariance of ``u``, the
    score of token v with ``m = A (e_v - ē)`` is ``m' S^-1 h - m' S^-1 m / 2``. Computed in float64.

    Args:
        state_NH: What crossed, coded as the states that are to be read.
        token_N: Of which tokens.
        embedding_VE: The model's embeddings.
        ridge: Relative to the mean square of an embedding's number.
        shrink: Relative to the mean variance of what is left over.

    Raises:
        LichenError: if there are fewer than two tokens, one is none of the vocabulary, or a state is no number.
    """
    if len(token_N) < 2 or len(token_N) != len(state_NH):
        raise LichenError(
            f"{len(state_NH)} states of {len(token_N)} tokens fit no decoder", where="split-audit", fix="use more text"
        )
    if not 0 <= int(token_N.min()) <= int(token_N.max()) < len(embedding_VE):
        raise LichenError(f"a token lies outside the {len(embedding_VE)} that have embeddings", where="split-audit")
    if not bool(state_NH.isfinite().all()):
        raise LichenError("a state is no finite number", where="split-audit")
    state_NH = state_NH.double()
    mean_H, scale_H = state_NH.mean(0), state_NH.std(0).clamp(min=1e-6)
    standard_NH = (state_NH - mean_H) / scale_H
    known_NE = embedding_VE[token_N].double()
    center_E = known_NE.mean(0)
    known_NE = known_NE - center_E
    gram_EE = known_NE.T @ known_NE
    gram_EE.diagonal().add_(ridge * gram_EE.diagonal().mean().clamp(min=1e-12))
    map_EH = torch.linalg.solve(gram_EE, known_NE.T @ standard_NH)
    left_NH = standard_NH - known_NE @ map_EH
    spread_HH = left_NH.T @ left_NH / len(left_NH)
    spread_HH.diagonal().add_(shrink * spread_HH.diagonal().mean().clamp(min=1e-12))
    # S is symmetric: what maps an embedding to its weight is computed once, not for every token.
    weigh_EH = torch.linalg.solve(spread_HH, map_EH.T).T
    quadratic_EE = (weigh_EH @ map_EH.T).float()
    away_VE = embedding_VE.float() - center_E.float()
    return TokenDecoder(
        mean_H=mean_H,
        scale_H=scale_H,
        weight_VH=away_VE @ weigh_EH.float(),
        bias_V=-0.5 * ((away_VE @ quadratic_EE) * away_VE).sum(-1),
    )


def token_recovery(
    state_NH: Tensor, token_N: Tensor, *, known_NH: Tensor, known_N: Tensor, embedding_VE: Tensor
) -> Recovery:
    """The share of tokens that both readers recover.

    Args:
        state_NH: What crossed of rows that are to be read.
        token_N: Their tokens, to compare with.
        known_NH: What crosses of text that the reader knows, coded in the same way.
        known_N: Its tokens.
        embedding_VE: The model's embeddings. Where states have another width there is no cosine, and nearest is 0.

    Raises:
        LichenError: if there is nothing to read, or as :func:`fit_decoder`.
    """
    if not len(token_N) or len(token_N) != len(state_NH):
        raise LichenError(f"{len(state_NH)} states of {len(token_N)} tokens cannot be read", where="split-audit")
    decoder = fit_decoder(known_NH, known_N, embedding_VE)
    same_width = state_NH.shape[1] == embedding_VE.shape[1]
    return Recovery(
        tokens=len(token_N),
        nearest=_share(nearest_tokens(state_NH, embedding_VE), token_N) if same_width else 0.0,
        linear=_share(decoder.tokens(state_NH), token_N),
        constant=float(token_N.bincount().max()) / len(token_N),
    )


def random_rows(vocabulary: int, rows: int, width: int, seed: int, *, first: int | None = None) -> Tensor:
    """Text that anybody can make up: uniformly random tokens, int64 ``(B, T)``.

    Args:
        vocabulary: V.
        rows: B.
        width: T.
        seed: Of the draw.
        first: The token that begins each row, where the tokenizer puts one there.

    >>> random_rows(10, 1, 4, 0, first=1).shape
    torch.Size([1, 4])
    """
    token_BT = torch.randint(vocabulary, (rows, width), generator=torch_generator(seed, "split-audit"))
    if first is not None:
        token_BT[:, 0] = first
    return token_BT


def _share(found_N: Tensor, token_N: Tensor) -> float:
    return float((found_N == token_N).double().mean())


def _best(state_NH: Tensor, weight_VH: Tensor, bias_V: Tensor) -> Tensor:
    parts = [(some @ weight_VH.T + bias_V).argmax(-1) for some in torch.split(state_NH, ABREAST)]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])
