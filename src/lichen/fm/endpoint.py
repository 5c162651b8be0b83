"""Configuration of an endpoint in the OpenAI format.

Four ways to ask, because endpoints differ in what they tell:

=========  ==============================================================================================
``echo``   ``/completions`` with ``echo``: the log-probability of every token of prompt and continuation
``first``  ``/completions``, one token: what is listed of the next token; one-token continuations only
``chat``   ``/chat/completions``, one token: the same of the answer's first token, spaces aside
``text``   ``/chat/completions``, a short answer in words, for endpoints that tell no log-probabilities
=========  ==============================================================================================

Texts are written through ``/completions`` for the first two and ``/chat/completions`` for the others; vectors
come from ``/embeddings``.

References:
    OpenAI. "API reference: Completions, Chat completions, Embeddings."
    https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final
from urllib.parse import urlsplit

from lichen.core.errors import LichenError

__all__ = ["Endpoint"]

_HERE = ("localhost", "127.0.0.1", "::1")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to ask, and how.

    Attributes:
        url: Up to the version, such as ``http://127.0.0.1:8080/v1``.
        model: How the endpoint calls the model.
        ask: ``echo``, ``first``, ``chat`` or ``text``.
        api_key_env: Environment variable that holds the key; empty: none is sent.
        top: Tokens to list, for ``first`` and ``chat``.
        timeout: Seconds a call may take.
        max_retries: How often a call that failed is made again, at most.
        pause: Seconds before the second try; doubles each time.
        rate_limit: Calls a second at most; None: as fast as they are answered.
        concurrency: Calls under way at once.
        batch: Texts in one call for vectors.
        embedder: How the endpoint calls the model that gives vectors; empty: as ``model``.
        cache: Folder of answers; None: none are kept.
        place: What errors call it: the recipe's key, where it stands in one.

    Raises:
        LichenError: if a value is out of range, or a key would cross a network in the clear.
    """

    url: str
    model: str
    ask: Literal["echo", "first", "chat", "text"] = "first"
    api_key_env: str = ""
    top: int = 20
    timeout: float = 60.0
    max_retries: int = 5
    pause: float = 0.5
    rate_limit: float | None = None
    concurrency: int = 1
    batch: int = 32
    embedder: str = ""
    cache: Path | None = None
    place: str = "endpoint"

    def __post_init__(self) -> None:
        plain = "is no plain http address"
        try:
            parts = urlsplit(self.url)
            port_fits = parts.port != 0
        except ValueError:
            parts, port_fits = urlsplit(""), False
        if "@" in parts.netloc:  # what stands before it is not shown: it may be a key
            plain = "holds a name or a key before its host"
        odd = any(not 32 < ord(letter) < 127 for letter in self.url)
        known = parts.scheme in ("http", "https") and parts.hostname and port_fits
        if not known or odd or "@" in parts.netloc or parts.query or parts.fragment:
            raise LichenError(
                plain,
                where=f"{self.place}.url",
                fix="write it as http://127.0.0.1:8080/v1, with a key in api_key_env",
            )
        if self.api_key_env and parts.scheme == "http" and parts.hostname not in _HERE:
            raise LichenError("would send the key in the clear", where=f"{self.place}.url", fix="use https")
        if self.ask not in ("echo", "first", "chat", "text"):
            raise LichenError(
                f"cannot ask {self.ask!r}", where=f"{self.place}.ask", fix="use echo, first, chat or text"
            )
        for name in ("top", "timeout", "concurrency", "batch"):
            if not getattr(self, name) > 0:
                raise LichenError(f"{getattr(self, name)} is not positive", where=f"{self.place}.{name}", fix="use > 0")
        if self.max_retries < 0:
            raise LichenError(f"{self.max_retries} is negative", where=f"{self.place}.max_retries", fix="use 0 or more")
        if self.pause < 0 or (self.rate_limit is not None and not self.rate_limit > 0):
            raise LichenError("a pause or rate is negative", where=f"{self.place}.pause", fix="use numbers above 0")
