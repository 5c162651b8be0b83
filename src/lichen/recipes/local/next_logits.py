"""The logits of the next token while an answer is written: of a local model, of an endpoint, and of three together.

A local model keeps the keys and values of earlier tokens, so that each step reads one token. An endpoint is sent the
text so far, and lists its likeliest tokens with their log-probabilities, which are its logits but for a number that all
of them share; what it does not list cannot be written.

References:
    Alisa Liu, Xiaochuang Han, Yizhong Wang, Yulia Tsvetkov, Yejin Choi and Noah A. Smith. "Tuning Language Models by
    Proxy." COLM 2024. https://arxiv.org/abs/2401.08565

Legend: T tokens so far, V tokens of a vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.http import HttpFM
from lichen.models.renamed import CACHE_NAMES, cache_argument, cache_of, takes_logits_to_keep
from lichen.models.tokens.proxied import combined

__all__ = ["EndpointLogits", "LocalLogits", "NextLogits", "replaced", "steered"]

NextLogits = Callable[[Sequence[int]], Tensor]
"""From the tokens so far to ``(V,)`` float32, minus infinity for what cannot be written."""


@final
class LocalLogits:
    """A frozen causal model of transformers; asked for a text that goes on from the last one, it reads the new tokens.

    Args:
        model: From :func:`lichen.models.loading.load.load_causal`.
    """

    def __init__(self, model: Any) -> None:
        signature = inspect.signature(model.forward)
        self._model, self._cache = model, cache_argument(signature)
        self._positions = "position_ids" in signature.parameters
        self._last = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        self._past: Any = None
        self._seen: list[int] = []

    def __call__(self, ids: Sequence[int], /) -> Tensor:
        """``(V,)`` float32."""
        from transformers import DynamicCache

        whole, known = list(ids), len(self._seen)
        if self._past is None or known >= len(whole) or whole[:known] != self._seen:
            self._past, known = DynamicCache(config=self._model.config) if self._cache else None, 0
        device = self._model.get_input_embeddings().weight.device
        more: dict[str, Any] = {"use_cache": self._cache is not None, **self._last}
        more |= {self._cache or CACHE_NAMES[0]: self._past} if self._cache else {}
        more |= {"position_ids": torch.arange(known, len(whole), device=device)[None]} if self._positions else {}
        with torch.no_grad():
            mask_1T = torch.ones(1, len(whole), dtype=torch.int64, device=device)
            out = self._model(input_ids=torch.tensor([whole[known:]], device=device), attention_mask=mask_1T, **more)
        if self._cache:
            self._past, self._seen = cache_of(out), whole
        logits_V: Tensor = out.logits[0, -1].float()
        return logits_V


@final
class EndpointLogits:
    """What an endpoint lists of the next token, by the numbers of a tokenizer.

    Tokens come as texts. One that is the text of several numbers, or half a character, has no number and is left out.

    Args:
        fm: The endpoint, asked ``first``.
        tokenizer: The small model's.
    """

    def __init__(self, fm: HttpFM, tokenizer: Any) -> None:
        self._fm, self._tokenizer = fm, tokenizer
        vocabulary = tokenizer.get_vocab()
        self._rows = max(vocabulary.values()) + 1
        lead = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        first, start = tokenizer("a")["input_ids"][:1], tokenizer.bos_token_id
        self._starts = {start} if first == [start] else set()
        before = len(self._text(lead))
        self._numbers = (
            _unique((self._text([*lead, number])[before:], number) for number in vocabulary.values()),
            _unique((self._text([number]), number) for number in vocabulary.values()),
            vocabulary,
        )

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def __call__(self, ids: Sequence[int], /) -> Tensor:
        """``(V,)`` float32 log-probabilities of what is listed.

        Raises:
            LichenError: if the endpoint refuses or lists nothing, or most of it is no token of the tokenizer.
        """
        own = len(ids) > 1 and ids[0] in self._starts
        ids = ids[1:] if own else ids  # the endpoint begins a text by itself
        listed = [(token, logp) for token, logp in self._fm.next_tokens(self._text(ids)) if token and "�" not in token]
        logits_V = torch.full((self._rows,), -math.inf)
        unknown = []
        for token, logp in listed:
            known = next((numbers[token] for numbers in self._numbers if token in numbers), None)
            if known is None:
                unknown.append(token)
            elif known >= 0:
                logits_V[known] = max(float(logits_V[known]), logp)
        if 2 * len(unknown) > len(listed) or not bool(logits_V.isfinite().any()):
            odd = f", such as {unknown[0]!r}" if unknown else ""
            raise LichenError(
                f"lists tokens that the run's tokenizer does not have{odd}",
                where=f"{self._fm.endpoint.place}.model",
                fix="name an endpoint of a model with the run's own tokenizer",
            )
        return logits_V


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Texts and their numbers; -1 for a text of several."""
    out: dict[str, int] = {}
    for text, number in pairs:
        out[text] = number if text not in out else -1
    return out


def replaced(big: NextLogits) -> Callable[[Tensor, Tensor], Tensor]:
    """The large model's logits in the place of the small one's; as :data:`lichen.recipes.artifacts.sampling.Steer`."""

    def steer(ids_1T: Tensor, small_1V: Tensor) -> Tensor:
        return _as_wide(big(ids_1T[0].tolist()), small_1V)

    return steer


def steered(big: NextLogits, untuned: NextLogits) -> Callable[[Tensor, Tensor], Tensor]:
    """``big + (tuned - untuned)`` in the place of the tuned small model's logits."""

    def steer(ids_1T: Tensor, tuned_1V: Tensor) -> Tensor:
        ids = ids_1T[0].tolist()
        rows_V = (x.to(tuned_1V.device) for x in (big(ids), tuned_1V[0], untuned(ids)))
        return _as_wide(combined(*rows_V), tuned_1V)

    return steer


def _as_wide(logits_V: Tensor, like_1V: Tensor) -> Tensor:
    """Logits of as many rows as another's; what is missing cannot be written."""
    out_1V = torch.full_like(like_1V, -math.inf)
    size = min(logits_V.shape[0], like_1V.shape[1])
    out_1V[0, :size] = logits_V[:size].to(out_1V)
    return out_1V
