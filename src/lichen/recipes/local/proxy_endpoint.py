"""Reads the file of an endpoint whose model is steered by a small one: a page of YAML with the keys of an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, final

from pydantic import Field

from lichen.core.errors import LichenError
from lichen.fm.endpoint import Endpoint
from lichen.fm.http import HttpFM
from lichen.recipes.schema.model import Positive, Section
from lichen.recipes.schema.strict import check, read_mapping, text_of

__all__ = ["read_endpoint"]


@final
class ProxyEndpointConfig(Section):
    """An endpoint in the OpenAI format that lists the likeliest next tokens."""

    url: str = Field(description="its address, the version included")
    model: str = Field(description="how the endpoint calls the model")
    ask: Literal["echo", "first", "chat", "text"] = Field(
        default="first", description="how log-probabilities are asked for; `first` alone goes on from a text"
    )
    top: Positive = Field(default=20, description="tokens to list; the answer is written with these alone")
    api_key_env: str = Field(default="", description="environment variable that holds the key; empty: none is sent")
    rate_limit: float | None = Field(default=None, gt=0, description="calls a second at most")
    timeout: float = Field(default=60.0, gt=0, description="seconds a call may take")
    max_retries: int = Field(default=5, ge=0, description="how often a call that failed is made again, at most")


def read_endpoint(file: Path) -> HttpFM:
    """The endpoint that a file describes; nothing is asked yet, and no answer is kept.

    Args:
        file: YAML.

    Raises:
        LichenError: if it is no such file, or its way of asking has no log-probabilities to go on from.
    """
    fix = "write url: and model:, as of a recipe's teacher.endpoint"
    values = read_mapping(text_of(file, kind="endpoint"), where=str(file), kind="endpoint", fix=fix)
    config = check(ProxyEndpointConfig, dict(values))
    if config.ask != "first":
        reason = {
            "text": "tells no log-probabilities",
            "chat": "tells those of an answer's first token, and cannot go on from a half-written one",
            "echo": "tells those of tokens that are there, and not which could come next",
        }[config.ask]
        raise LichenError(
            f"ask: {config.ask} {reason}", where=f"{file}: ask", fix="use ask: first, or another endpoint"
        )
    return HttpFM(Endpoint(**config.model_dump(), place=str(file)))
