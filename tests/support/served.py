"""A tiny model behind Lichen's own address, and plain ways to ask it."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lichen.models.loading.load import load_causal
from lichen.serving.contract import ServedModel
from lichen.serving.prompts import folder_prompts
from lichen.serving.server import Limits, ModelServer
from lichen.serving.transformers_model import TransformersModel
from support.tiny_llama import save_model


def tiny(folder: Path, *, seed: int = 0, name: str = "tiny", more: tuple[str, ...] = ()) -> TransformersModel:
    """A random Llama as it would be served."""
    model, tokenizer = load_causal(save_model(folder, seed=seed, more=more))
    return TransformersModel(model, tokenizer, name=name, prompts=folder_prompts(model, tokenizer))


@contextmanager
def at_address(model: ServedModel, *, limits: Limits | None = None, **more: Any) -> Iterator[ModelServer]:
    """The model at a free port."""
    server = ModelServer(model, limits=limits, **more)
    try:
        yield server
    finally:
        server.close()


def ask(
    server: ModelServer, path: str, body: Any = None, *, head: Mapping[str, str] | None = None, method: str = ""
) -> tuple[int, dict[str, Any]]:
    """``(status, object)`` of one request; bytes are sent as they are, all else as JSON."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    fields = {**({} if data is None else {"Content-Type": "application/json"}), **(head or {})}
    try:
        link.request(method or ("GET" if data is None else "POST"), path, body=data, headers=fields)
        reply = link.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        link.close()


def events(server: ModelServer, path: str, body: Mapping[str, Any]) -> list[Any]:
    """The events of a streamed answer, the last of which is ``"[DONE]"``."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        data = json.dumps({**body, "stream": True}).encode()
        link.request("POST", path, body=data, headers={"Content-Type": "application/json"})
        reply = link.getresponse()
        assert (reply.status, reply.getheader("Content-Type")) == (200, "text/event-stream")
        found = [line.removeprefix(b"data: ").strip() for line in reply if line.startswith(b"data: ")]
        return [one.decode() if one == b"[DONE]" else json.loads(one) for one in found]
    finally:
        link.close()


def raw(server: ModelServer, data: bytes, *, timeout: float = 30.0) -> bytes:
    """What comes back for these bytes, until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout) as link:
        link.sendall(data)
        found = b""
        while some := link.recv(65536):
            found += some
        return found
