"""A foundation model behind an HTTP endpoint in the OpenAI format.

A continuation that is not listed gets the lowest listed log-probability, which bounds its own from above,
and is counted as missed. An endpoint that lists none is asked in words (``ask: text``): it writes a short
answer at temperature 0, the choice it names gets probability one, and where it names none all are equally
likely and the row is counted as missed. How calls are made again, paced and signed is told in
:mod:`lichen.fm.retry`. Answers may be kept on disk (:class:`lichen.fm.cache.CacheStore`), each file
with the endpoint, the model, the date and what was asked.

References:
    OpenAI. "API reference: Completions, Chat completions, Embeddings."
    https://platform.openai.com/docs/api-reference

Legend: N prompts, K continuations of each, H width.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.fm.cache import CacheStore, from_base64, to_base64
from lichen.fm.endpoint import Endpoint
from lichen.fm.interface import Usage, answer_by_score, check_choices, check_generation
from lichen.fm.parsing import cut_at, matched
from lichen.fm.retry import Caller

__all__ = ["HttpFM"]

_STOPS = 4  # more marks than the format takes are cut at here
_SHORT = 8  # tokens beyond the letters of the longest choice: an answer in words may begin with some of its own


@final
class HttpFM:
    """An endpoint as a foundation model.

    Args:
        endpoint: Where and how.
        sleep: Waits so many seconds.
    """

    def __init__(self, endpoint: Endpoint, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.endpoint, self.name = endpoint, endpoint.model
        self._usage = Usage()
        self._lock = threading.Lock()
        self._store = None if endpoint.cache is None else CacheStore(endpoint.cache)
        self._caller = Caller(endpoint, sleep=sleep, again=lambda: self._add_usage(retries=1))

    @property
    def usage(self) -> Usage:
        """What it was asked so far."""
        return self._usage

    @property
    def source(self) -> str:
        """The endpoint's address, and the way it is asked."""
        return f"{self.endpoint.url}#{self.endpoint.ask}"

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        """``(N, K)`` float64 log-probabilities; see :meth:`lichen.fm.interface.FoundationModel.score`.

        Raises:
            LichenError: if the numbers of texts do not fit, the endpoint refuses or stays silent, or its
                answer lacks log-probabilities.
        """
        if len(prompts) != len(continuations) or len({len(some) for some in continuations}) > 1:
            raise LichenError("prompts and continuations do not pair up", where="score", fix="give K texts a prompt")
        if self.endpoint.ask == "text":
            raise LichenError(
                "text has no log-probabilities",
                where=f"{self.endpoint.place}.ask",
                fix="use echo, first or chat, or ask for answers",
            )
        requests = list(zip(prompts, continuations, strict=True))
        if self.endpoint.ask == "echo":
            singles = [(prompt, text) for prompt, some in requests for text in some]
            found = self._in_parallel(lambda pair: self._echoed(*pair), singles)
            return torch.tensor(found, dtype=torch.float64).view(len(prompts), -1)
        found = self._in_parallel(lambda pair: self._listed(*pair), requests)
        return torch.tensor(found, dtype=torch.float64).view(len(prompts), -1 if prompts else 0)

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        """``(N, K)`` float64 probabilities: by score, or of a written answer where the endpoint tells no scores.

        Raises:
            LichenError: as :meth:`score` does, or if there is nothing to choose between.
        """
        if self.endpoint.ask != "text":
            return answer_by_score(self, prompts, choices)
        check_choices(choices)
        max_new_tokens = _SHORT + max(len(choice) for choice in choices)
        out_NK = torch.zeros(len(prompts), len(choices), dtype=torch.float64)
        texts = self.generate(prompts, seeds=[0] * len(prompts), max_new_tokens=max_new_tokens, temperature=0.0)
        for n, text in enumerate(texts):
            k = matched(text, choices)
            if k is None:
                out_NK[n] = 1 / len(choices)
                self._add_usage(missed=1)
            else:
                out_NK[n, k] = 1.0
        return out_NK

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """N texts; see :meth:`lichen.fm.interface.Generator.generate`. What a seed is worth is up to the endpoint.

        Raises:
            LichenError: if a setting is out of range, or the endpoint refuses, stays silent or writes no text.
        """
        check_generation(prompts, seeds, max_new_tokens, temperature, top_p)
        body: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        body |= {"stop": list(stop[:_STOPS])} if stop else {}
        # Of seeds of 64 bits many servers take the lower half alone, and some read its top bit as "at random".
        requests = [(p, {**body, "seed": int(seed) & 0x7FFFFFFF}) for p, seed in zip(prompts, seeds, strict=True)]
        return [cut_at(text, stop) for text in self._in_parallel(lambda pair: self._written(*pair), requests)]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, H)`` float32 of length one, ``endpoint.batch`` texts a call.

        Raises:
            LichenError: if the endpoint refuses, stays silent or gives no vectors of one width.
        """
        model = self.endpoint.embedder or self.endpoint.model
        address = self.endpoint.url + "/embeddings"
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for text in dict.fromkeys(texts):
            entry = self._store and self._store.get({"url": address, "model": model, "input": text})
            if entry and isinstance(entry.get("embedding"), str):
                found[text] = from_base64(entry["embedding"])
                self._add_usage(cached=1)
            else:
                missing.append(text)
        size = self.endpoint.batch
        parts = [missing[at : at + size] for at in range(0, len(missing), size)]
        for part, rows in zip(parts, self._in_parallel(lambda some: self._embedded(model, some), parts), strict=True):
            found |= dict(zip(part, rows, strict=True))
        if len({len(x) for x in found.values()}) > 1:
            raise LichenError(f"{model} gives vectors of unequal width", where="endpoint", fix="ask one model")
        return torch.stack([found[text] for text in texts]) if texts else torch.zeros(0, 0)

    def _in_parallel(self, do: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
        if self.endpoint.concurrency == 1:
            return [do(one) for one in requests]
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            return list(pool.map(do, requests))

    def _echoed(self, prompt: str, text: str) -> float:
        body = {"prompt": prompt + text, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        response = self._ask("/completions", body).get("logprobs")
        if not isinstance(response, Mapping) or not response.get("text_offset") or not response.get("token_logprobs"):
            raise LichenError(
                f"{self.name} does not echo log-probabilities",
                where=f"{self.endpoint.place}.ask",
                fix="use first or chat",
            )
        whole, total, count = len(prompt + text), 0.0, 0
        for at, token, logp in zip(
            response["text_offset"], response["tokens"], response["token_logprobs"], strict=True
        ):
            if at < whole and at + len(token) > len(prompt):
                total, count = total + _number(logp, self.name), count + 1
        if not count:
            raise LichenError("a continuation has no tokens", where="score", fix="give it some text")
        return total

    def _listed(self, prompt: str, texts: Sequence[str]) -> list[float]:
        ask, top = self.endpoint.ask, self.endpoint.top
        body: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
        if ask == "chat":
            body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": top}
        else:
            body |= {"prompt": prompt, "logprobs": top}
        response = self._ask("/chat/completions" if ask == "chat" else "/completions", body).get("logprobs")
        listed = _first_token(response)
        if not listed:
            raise LichenError(
                f"{self.name} lists no log-probabilities", where=f"{self.endpoint.place}.ask", fix="ask another way"
            )
        found = []
        for text in texts:
            same = [x for token, x in listed if (token.strip() == text.strip() if ask == "chat" else token == text)]
            logps = [_number(x, self.name) for x in same]
            if logps:
                most = max(logps)
                found.append(most + math.log(sum(math.exp(x - most) for x in logps)))
            else:
                found.append(min(_number(x, self.name) for _, x in listed))
                self._add_usage(missed=1)
        return found

    def _written(self, prompt: str, body: Mapping[str, Any]) -> str:
        if self.endpoint.ask in ("chat", "text"):
            response = self._ask("/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})
            response = response.get("message") or {}
            text = response.get("content") if isinstance(response, Mapping) else None
        else:
            text = self._ask("/completions", {**body, "prompt": prompt}).get("text")
        if not isinstance(text, str):
            raise LichenError(f"{self.name} writes no text", where=f"{self.endpoint.place}.ask", fix="ask another way")
        return text

    def _embedded(self, model: str, texts: Sequence[str]) -> list[Tensor]:
        answer = self._caller.post("/embeddings", {"model": model, "input": list(texts), "encoding_format": "float"})
        try:
            response = {int(one["index"]): one["embedding"] for one in answer["data"]}
            raw = [torch.tensor(response[n], dtype=torch.float32).view(-1) for n in range(len(texts))]
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise LichenError(
                f"{model} gives no vectors", where=f"endpoint {self.endpoint.url}", fix="name an endpoint.embedder"
            ) from None
        usage = answer.get("usage") or {}
        self._add_usage(calls=1, tokens_in=_whole(usage.get("prompt_tokens")))
        rows = [x / x.norm().clamp(min=1e-12) for x in raw]
        if self._store is not None:
            for text, row in zip(texts, rows, strict=True):
                request = {"url": self.endpoint.url + "/embeddings", "model": model, "input": text}
                self._store.put(request, {"embedding": to_base64(row)}, endpoint=self.endpoint.url, model=model)
        return rows

    def _ask(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The first choice of an answer, from the cache or the endpoint."""
        url = self.endpoint.url.rstrip("/") + path
        body = {"model": self.endpoint.model, **body}
        request = {"url": url, **body}
        entry = None if self._store is None else self._store.get(request)
        if entry is not None:
            self._add_usage(cached=1)
            return entry
        answer = self._caller.post(path, body)
        try:
            first = answer["choices"][0]
            choice = {name: first[name] for name in ("logprobs", "text", "message") if first.get(name) is not None}
        except (KeyError, IndexError, TypeError, AttributeError):
            raise LichenError("answers in another format", where=f"endpoint {url}", fix="check endpoint.url") from None
        usage = answer.get("usage") or {}
        tokens = {"in": _whole(usage.get("prompt_tokens")), "out": _whole(usage.get("completion_tokens"))}
        self._add_usage(calls=1, tokens_in=tokens["in"], tokens_out=tokens["out"])
        if self._store is not None:
            self._store.put(request, choice, endpoint=self.endpoint.url, model=self.endpoint.model, tokens=tokens)
        return choice

    def _add_usage(self, **more: int) -> None:
        with self._lock:
            self._usage = replace(self._usage, **{k: getattr(self._usage, k) + x for k, x in more.items()})


def _first_token(response: Any) -> list[tuple[str, Any]]:
    """What is listed of the first token, in the older form of the format or the newer one."""
    try:
        if response.get("content"):
            return [(str(one["token"]), one["logprob"]) for one in response["content"][0]["top_logprobs"]]
        return [(str(token), logp) for token, logp in response["top_logprobs"][0].items()]
    except (AttributeError, KeyError, IndexError, TypeError):
        return []


def _number(x: Any, name: str) -> float:
    if not isinstance(x, int | float) or not math.isfinite(x):
        raise LichenError(f"{name} gives {x!r} for a log-probability", where="endpoint", fix="ask another way")
    return float(x)


def _whole(x: Any) -> int:
    return x if isinstance(x, int) and x > 0 else 0
