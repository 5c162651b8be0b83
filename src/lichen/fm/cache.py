"""Caches a foundation model's responses on disk, with provenance, so that runs repeat without it.

A :class:`CacheStore` is a folder with one JSON file a request, named by the digest of what was asked. A file holds
what was asked (texts, seed, settings), what was told, and the model, its weights' digest or endpoint, and the
date. It is written whole or not at all, and a damaged one is as good as none. :class:`CachedModel` puts a store before
any model; :class:`lichen.fm.http.HttpFM` keeps its endpoint's answers on one in the same way.
:class:`OfflineModel` stands for a model that is no longer there: with a full store before it, nothing else is needed.

What is kept holds the texts that were asked about, and its files are for their owner alone (mode 0600). Of a private
text nothing is written but its digest: see :meth:`CachedModel.without_texts`.

Legend: N prompts, K choices, H width.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, final

import numpy as np
import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_atomic
from lichen.fm.interface import FoundationModel, Sourced, Usage, check_choices, check_generation

__all__ = ["CacheStore", "CachedModel", "OfflineModel", "from_base64", "to_base64"]


@final
class CacheStore:
    """A folder of answers; any number of threads may use one.

    Args:
        folder: Made when something is first kept.
    """

    __slots__ = ("_lock", "folder")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def get(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was told when this was asked; None if that is not known, or its file is damaged."""
        key = _key(request)
        try:
            entry = json.loads(self._file(key).read_bytes())
            answer = entry["told"]
            return dict(answer) if entry["from"]["asked"] == key and entry["from"]["told"] == _key(answer) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, request: Mapping[str, Any], answer: Mapping[str, Any], *, words: bool = True, **source: Any) -> None:
        """Keep an answer.

        Args:
            request: What was asked; its digest is how the answer is found again.
            answer: The answer.
            words: Write what was asked beside it.
            source: Where it comes from.
        """
        key = _key(request)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        from_ = {**source, "date": date, "asked": key, "told": _key(answer)}
        whole = {"from": from_, "asked": request if words else None, "told": answer}
        data = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        with self._lock:  # two threads that were told the same would write one file's part together
            write_atomic(self._file(key), data.encode("utf-8", "surrogatepass"))

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@final
class CachedModel:
    """A model whose answers are cached: what was asked before is read, the rest is asked and written.

    The same prompt, settings and seed are one request, also within a call; where the temperature is 0 the seed
    is none of them. Answers are written after every ``batch`` requests, so that a kill loses no more than that.

    Args:
        fm: Whom to ask; :class:`OfflineModel` if there is nobody.
        folder: Where answers lie.
        batch: Requests handed on at once; let it be a multiple of a local model's batch.
    """

    def __init__(self, fm: FoundationModel, folder: Path, *, batch: int = 64) -> None:
        if batch < 1:
            raise LichenError("asks for nothing at once", where="batch", fix="use 1 or more")
        self.name, self.batch = fm.name, batch
        self._fm, self._store, self._words = fm, CacheStore(folder), True
        self._cached = [0]  # shared with the discreet one

    def without_texts(self) -> CachedModel:
        """The same model for private texts: answers are found by the texts' digests, the texts are not written."""
        other = CachedModel(self._fm, self._store.folder, batch=self.batch)
        other._store, other._cached, other._words = self._store, self._cached, False
        return other

    @property
    def usage(self) -> Usage:
        """What the model behind was asked, and how many requests were answered from disk."""
        return self._fm.usage + Usage(cached=self._cached[0])

    @property
    def source(self) -> str:
        """That of the model behind."""
        return self._fm.source if isinstance(self._fm, Sourced) else ""

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        """``(N, K)`` float64; see :meth:`lichen.fm.interface.Scorer.score`."""
        if len(prompts) != len(continuations) or len({len(some) for some in continuations}) > 1:
            raise LichenError("prompts and continuations do not pair up", where="score", fix="give K texts a prompt")
        requests = [{"prompt": p, "texts": list(some)} for p, some in zip(prompts, continuations, strict=True)]

        def ask(rows: list[int]) -> list[Any]:
            logp_NK = self._fm.score([prompts[n] for n in rows], [continuations[n] for n in rows])
            return [row.tolist() for row in logp_NK.double()]

        wide = len(continuations[0]) if continuations else 0
        return torch.tensor(self._through("score", requests, ask), dtype=torch.float64).view(len(prompts), wide)

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        """``(N, K)`` float64; see :meth:`lichen.fm.interface.FoundationModel.answer`."""
        check_choices(choices)
        requests = [{"prompt": prompt, "choices": list(choices)} for prompt in prompts]

        def ask(rows: list[int]) -> list[Any]:
            return [row.tolist() for row in self._fm.answer([prompts[n] for n in rows], choices).double()]

        return torch.tensor(self._through("answer", requests, ask), dtype=torch.float64).view(
            len(prompts), len(choices)
        )

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
        """N texts; see :meth:`lichen.fm.interface.Generator.generate`."""
        check_generation(prompts, seeds, max_new_tokens, temperature, top_p)
        settings = {
            "most": max_new_tokens,
            "temperature": float(temperature),
            "top_p": float(top_p),
            "stop": list(stop),
        }
        requests = [
            {"prompt": prompt, "seed": int(seed) if temperature else 0, **settings}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

        def ask(rows: list[int]) -> list[Any]:
            some, own = [prompts[n] for n in rows], [seeds[n] for n in rows]
            return self._fm.generate(
                some, seeds=own, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop
            )

        return [str(text) for text in self._through("generate", requests, ask)]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """``(N, H)`` float32; see :meth:`lichen.fm.interface.Embedder.embed`."""

        def ask(rows: list[int]) -> list[Any]:
            return [to_base64(row) for row in self._fm.embed([texts[n] for n in rows])]

        found = self._through("embed", [{"prompt": text} for text in texts], ask)
        return torch.stack([from_base64(x) for x in found]) if found else self._fm.embed(())

    def _through(
        self, kind: str, requests: Sequence[Mapping[str, Any]], ask: Callable[[list[int]], list[Any]]
    ) -> list[Any]:
        """Every request's answer, from the store or from ``ask``, which is given the rows that are missing."""
        about = {"kind": kind, "model": self.name, "source": self.source}
        whole = [{**about, **one} for one in requests]
        keys = [_key(one) for one in whole]
        found: dict[str, Any] = {}
        missing: dict[str, int] = {}
        for n, key in enumerate(keys):
            if key in found or key in missing:
                continue
            entry = self._store.get(whole[n])
            if entry is None or "told" not in entry:
                missing[key] = n
            else:
                found[key] = entry["told"]
        self._cached[0] += sum(key in found for key in keys)
        # Texts of like length together: a local model pads what shares a batch.
        rows = sorted(missing.values(), key=lambda n: len(whole[n]["prompt"]))
        for at in range(0, len(rows), self.batch):
            some, before = rows[at : at + self.batch], self._fm.usage
            answers = ask(some)
            after = self._fm.usage
            # A model tells what a call cost, not which of its rows: those that share one share its tokens.
            call = {"rows": len(some)} | {
                key: getattr(after, key) - getattr(before, key) for key in ("tokens_in", "tokens_out")
            }
            for n, answer in zip(some, answers, strict=True):
                found[keys[n]] = answer
                source = {"model": self.name, "source": self.source, "call": call}
                self._store.put(whole[n], {"told": answer}, words=self._words, **source)
        return [found[key] for key in keys]


@final
class OfflineModel:
    """A model that is not here: its name and source are known, and every question is refused.

    Args:
        name: As it called itself.
        source: As it was; see :class:`lichen.fm.interface.Sourced`.
    """

    __slots__ = ("name", "source", "usage")

    def __init__(self, name: str, *, source: str = "") -> None:
        self.name, self.source, self.usage = name, source, Usage()

    def score(self, prompts: Sequence[str], continuations: Sequence[Sequence[str]]) -> Tensor:
        """Refused."""
        self._refuse()

    def answer(self, prompts: Sequence[str], choices: Sequence[str]) -> Tensor:
        """Refused."""
        self._refuse()

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
        """Refused."""
        self._refuse()

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Refused."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise LichenError(
            f"{self.name} is not here, and its answer to this was not kept",
            where="teacher",
            fix="load the model or name its endpoint, or give the folder that its answers were kept in",
        )


def to_base64(x_H: Tensor) -> str:
    """A vector as text, bit for bit.

    >>> from_base64(to_base64(torch.tensor([0.1, -2.0]))).tolist() == torch.tensor([0.1, -2.0]).tolist()
    True
    """
    return base64.b64encode(x_H.detach().cpu().float().numpy().astype("<f4").tobytes()).decode()


def from_base64(text: str) -> Tensor:
    """Undo :func:`to_base64`; float32."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
