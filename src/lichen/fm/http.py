"""A foundation model behind an HTTP endpoint in the OpenAI format.

A continuation that is not listed gets the lowest listed log-probability, which bounds its own from above,
and is counted as missed. An endpoint that lists none is asked in words (``ask: text``): it writes a short
answer at temperature 0, the choice it names gets probability one, and where it names none all are equally
likely and the row is counted as missed. How calls are made again, paced and signed:
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
from lichen.fm.response import Choice, Completion, Echo, Embeddings, Logprobs, read_as
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
        echo = read_as(Echo, self._ask("/completions", body).logprobs)
        if echo is None or not len(echo.tokens) == len(echo.text_offset) == len(echo.token_logprobs) > 0:
            raise LichenError(
                f"{self.name} does not echo log-probabilities",
                where=f"{self.endpoint.place}.ask",
                fix="use first or chat",
            )
        whole, total, count = len(prompt + text), 0.0, 0
        for at, token, logp in zip(echo.text_offset, echo.tokens, echo.token_logprobs, strict=True):
            if at < whole and at + len(token) > len(prompt):
                if logp is None:
                    raise LichenError(
                        f"{self.name} gives no log-probability for {token!r}", where="endpoint", fix="ask another way"
                    )
                total, count = total + logp, count + 1
        if not count:
            raise LichenError("a continuation has no tokens", where="score", fix="give it some text")
        return total

    def next_tokens(self, prompt: str) -> list[tuple[str, float]]:
        """The likeliest tokens after a text, and their log-probabilities; as many as the endpoint lists.

        Raises:
            LichenError: if the endpoint refuses, stays silent, or lists none.
        """
        ask, top = self.endpoint.ask, self.endpoint.top
        body: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
        if ask == "chat":
            body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True, "top_logprobs": top}
        else:
            body |= {"prompt": prompt, "logprobs": top}
        response = self._ask("/chat/completions" if ask == "chat" else "/completions", body).logprobs
        logprobs = read_as(Logprobs, response)
        listed = [] if logprobs is None else logprobs.first()
        if not listed:
            raise LichenError(
                f"{self.name} lists no log-probabilities", where=f"{self.endpoint.place}.ask", fix="ask another way"
            )
        return listed

    def _listed(self, prompt: str, texts: Sequence[str]) -> list[float]:
        listed, ask = self.next_tokens(prompt), self.endpoint.ask
        found = []
        for text in texts:
            logps = [x for token, x in listed if (token.strip() == text.strip() if ask == "chat" else token == text)]
            if logps:
                most = max(logps)
                found.append(most + math.log(sum(math.exp(x - most) for x in logps)))
            else:
                found.append(min(x for _, x in listed))
                self._add_usage(missed=1)
        return found

    def _written(self, prompt: str, body: Mapping[str, Any]) -> str:
        if self.endpoint.ask in ("chat", "text"):
            reply = self._ask("/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]})
            text = None if reply.message is None else reply.message.content
        else:
            text = self._ask("/completions", {**body, "prompt": prompt}).text
        if text is None:
            raise LichenError(f"{self.name} writes no text", where=f"{self.endpoint.place}.ask", fix="ask another way")
        return text

    def _embedded(self, model: str, texts: Sequence[str]) -> list[Tensor]:
        body = {"model": model, "input": list(texts), "encoding_format": "float"}
        answer = read_as(Embeddings, self._caller.post("/embeddings", body))
        found = {} if answer is None else {one.index: one.embedding for one in answer.data}
        if answer is None or any(n not in found for n in range(len(texts))):
            raise LichenError(
                f"{model} gives no vectors", where=f"endpoint {self.endpoint.url}", fix="name an endpoint.embedder"
            )
        raw = [torch.tensor(found[n], dtype=torch.float32) for n in range(len(texts))]
        if not all(bool(x.isfinite().all()) for x in raw):
            raise LichenError(
                f"{model} gives vectors past float32", where=f"endpoint {self.endpoint.url}", fix="ask another embedder"
            )
        self._add_usage(calls=1, tokens_in=_tokens(answer)[0])
        rows = [x / x.norm().clamp(min=1e-12) for x in raw]
        if self._store is not None:
            for text, row in zip(texts, rows, strict=True):
                request = {"url": self.endpoint.url + "/embeddings", "model": model, "input": text}
                self._store.put(request, {"embedding": to_base64(row)}, endpoint=self.endpoint.url, model=model)
        return rows

    def _ask(self, path: str, body: Mapping[str, Any]) -> Choice:
        """The first choice of an answer, from the cache or the endpoint."""
        url = self.endpoint.url.rstrip("/") + path
        body = {"model": self.endpoint.model, **body}
        request = {"url": url, **body}
        entry = None if self._store is None else read_as(Choice, self._store.get(request))
        if entry is not None:
            self._add_usage(cached=1)
            return entry
        answer = read_as(Completion, self._caller.post(path, body))
        if answer is None:
            raise LichenError("answers in another format", where=f"endpoint {url}", fix="check endpoint.url")
        choice = answer.choices[0]
        tokens_in, tokens_out = _tokens(answer)
        self._add_usage(calls=1, tokens_in=tokens_in, tokens_out=tokens_out)
        if self._store is not None:
            stored, tokens = choice.model_dump(exclude_none=True), {"in": tokens_in, "out": tokens_out}
            self._store.put(request, stored, endpoint=self.endpoint.url, model=self.endpoint.model, tokens=tokens)
        return choice

    def _add_usage(self, **more: int) -> None:
        with self._lock:
            self._usage = replace(self._usage, **{k: getattr(self._usage, k) + x for k, x in more.items()})


def _tokens(answer: Completion | Embeddings) -> tuple[int, int]:
    """``(in, out)``, as far as they are counted."""
    usage = answer.usage
    return (0, 0) if usage is None else (usage.prompt_tokens or 0, usage.completion_tokens or 0)
