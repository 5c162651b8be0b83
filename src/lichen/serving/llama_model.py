"""A GGUF file that llama.cpp computes, in a process of its own.

What llama.cpp cuts off by itself is off: ``top_k`` and ``min_p``, so that temperature and ``top_p`` mean what they mean
for other models. Nothing is read from a cache of prompts, so that a request that is made alone has the same answer
each time. A process that has ended, as one may that reads a damaged file, is started again with the next request.

References:
    Georgi Gerganov and others. "llama.cpp: LLM inference in C/C++." https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from lichen.core.children import bound_environment
from lichen.core.errors import LichenError
from lichen.core.visible import clipped
from lichen.serving.contract import ApiError, Completion, Piece, Prompted, TokenLogprob

__all__ = ["LlamaModel"]

_MAGIC = b"GGUF"
_LOAD = 600.0
"""Seconds that loading may take."""
_PAUSE = 600.0
"""Seconds between two pieces of an answer, at most."""
_SEEDS = 2**32 - 1
"""llama.cpp's seeds have 32 bits, of which the last number means any."""
_CHAT_TOKENS = 512
_FIX = "fetch it again, whole; or give the model as a folder with safetensors"


@final
class _SocketConnection(http.client.HTTPConnection):
    """HTTP over a socket of the file system."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_PAUSE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@final
class LlamaModel:
    """A GGUF file.

    Args:
        file: The file.
        name: How it is called.
        context: Tokens that all requests under way have together; no more than the model has.
        threads: Threads that compute; all cores that this process may use if 0.

    Raises:
        LichenError: if xllamacpp is not installed, the file is no GGUF file, or llama.cpp cannot read it.
    """

    kind = "llama.cpp"

    def __init__(self, file: Path, *, name: str, context: int = 4096, threads: int = 0) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            what = "GGUF files need the library xllamacpp, which is not installed"
            raise LichenError(what, where=str(file), fix="pip install 'lichen[local]'")
        try:
            with open(file, "rb") as stream:
                magic = stream.read(len(_MAGIC))
        except OSError as error:
            raise LichenError(f"cannot be read: {error.strerror}", where=str(file), fix=_FIX) from None
        if magic != _MAGIC:
            raise LichenError("is no GGUF file", where=str(file), fix=_FIX)
        self.name, self.file = name, file
        self._folder = tempfile.mkdtemp(prefix="lichen-")  # for this user alone
        self._socket = os.path.join(self._folder, "llama.sock")
        cores = threads or len(os.sched_getaffinity(0))
        self._words = [str(file.absolute()), self._socket, name, str(context), str(cores)]
        self._state = threading.Condition()
        self._child: subprocess.Popen[bytes] | None = None
        self._ready, self._requested, self._closed, self._fault = False, True, False, ""
        start = time.perf_counter()
        threading.Thread(target=self._attend, daemon=True).start()
        try:
            self._when_ready()
        except ApiError as error:
            self.close()
            raise LichenError(
                f"llama.cpp cannot read the GGUF file: {error.message}", where=str(file), fix=_FIX
            ) from None
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    def complete(self, request: Completion) -> Generator[Piece, None, None]:
        """The pieces of an answer; see :meth:`lichen.serving.contract.ServedModel.complete`.

        Raises:
            ApiError: if llama.cpp refuses the request, or its process ends.
        """
        body: dict[str, Any] = {
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": request.seed % _SEEDS,
            "max_tokens": _CHAT_TOKENS if request.max_tokens is None else request.max_tokens,
            "cache_prompt": False,
        }
        body |= {"stop": list(request.stop)} if request.stop else {}
        if request.messages:
            path = "/v1/chat/completions"
            body["messages"] = [{"role": one.role, "content": one.content} for one in request.messages]
            body |= {} if request.top is None else {"logprobs": True, "top_logprobs": request.top}
        else:
            path = "/v1/completions"
            body["prompt"] = request.prompt
            body |= {} if request.top is None else {"logprobs": max(request.top, 1)}
        pieces = self._pieces(path, body, request.top)
        first = next(pieces)  # what is refused is refused before an answer begins
        return _joined(first, pieces)

    def _pieces(self, path: str, body: Mapping[str, Any], top: int | None) -> Generator[Piece, None, None]:
        self._when_ready()
        link = _SocketConnection(self._socket)
        try:
            link.request("POST", path, body=json.dumps(body).encode(), headers={"Content-Type": "application/json"})
            reply = link.getresponse()
            if reply.status != 200:
                raise _refusal(reply.status, reply.read())
            yield from _read_events(reply, top)
        except (OSError, http.client.HTTPException, ValueError):
            raise ApiError(502, "llama.cpp ended before its answer did", kind="server_error") from None
        finally:
            link.close()

    def prompt_logprobs(self, prompt: str, top: int) -> Prompted:
        """Nothing: llama.cpp gives none.

        Raises:
            ApiError: always.
        """
        raise ApiError(400, "llama.cpp gives no log-probabilities of a prompt", param="echo")

    def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """Nothing: a file of this kind is served for texts alone.

        Raises:
            ApiError: always.
        """
        raise ApiError(400, "a GGUF file gives no vectors here: serve the model as a folder", param="model")

    def processes(self) -> tuple[int, ...]:
        """llama.cpp's."""
        return () if self._child is None else (self._child.pid,)

    def close(self) -> None:
        """End llama.cpp."""
        with self._state:
            self._closed, self._requested = True, True
            child = self._child
            self._state.notify_all()
        if child is not None:
            with suppress(OSError):
                child.kill()
            child.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _when_ready(self) -> None:
        """Wait until the process answers; start it again if it has ended."""
        with self._state:
            if not self._ready:
                self._requested = True
                self._state.notify_all()
            over = time.monotonic() + _LOAD
            while not (self._ready or self._fault or self._closed):
                if not self._state.wait(max(0.0, over - time.monotonic())) and time.monotonic() >= over:
                    raise ApiError(503, f"it was not loaded within {_LOAD:.0f} seconds", kind="server_error")
            if not self._ready:
                fault, self._fault = self._fault, ""
                raise ApiError(503, fault or "the server is closing", kind="server_error")

    def _attend(self) -> None:
        """Start the process whenever it is wanted, and wait for its end, in the thread whose end would be its end."""
        while True:
            with self._state:
                while not self._requested:
                    self._state.wait()
                self._requested = False
                if self._closed:
                    return
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "lichen.serving.llama_child", *self._words],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=bound_environment({**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}),
                )
            assert self._child.stdout is not None
            with self._child.stdout as stream:
                word = stream.read(2000).decode(errors="replace")
            with self._state:
                self._ready = word == "ready"
                if not self._ready:
                    code = self._child.wait()
                    self._fault = clipped(" ".join(word.split()), 300) or f"its process ended with code {code}"
                self._state.notify_all()
            self._child.wait()
            with self._state:
                self._ready = False
            with suppress(OSError):
                os.unlink(self._socket)


def _joined(first: Piece, rest: Generator[Piece, None, None]) -> Generator[Piece, None, None]:
    try:
        yield first
        if first.finish is None:
            yield from rest
    finally:
        rest.close()


def _refusal(status: int, data: bytes) -> ApiError:
    """llama.cpp's own error, with its sentence."""
    try:
        about = json.loads(data)["error"]
        message = clipped(" ".join(str(about["message"]).split()), 300)
    except (ValueError, KeyError, TypeError):
        message = "llama.cpp refuses the request"
    status = status if 400 <= status < 600 else 502
    return ApiError(status, message, kind="invalid_request_error" if status < 500 else "server_error")


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in reply:
        if line.startswith(b"error:"):
            raise _refusal(500, b'{"error":' + line.removeprefix(b"error:") + b"}")
        if line.startswith(b"data:") and (data := line.removeprefix(b"data:").strip()) != b"[DONE]":
            event = json.loads(data)
            if "error" in event:
                raise _refusal(int(event["error"].get("code", 500)), data)
            yield event


def _read_events(reply: http.client.HTTPResponse, top: int | None) -> Generator[Piece, None, None]:
    """The pieces of a stream of llama.cpp's; the last comes when it has counted."""
    finish, usage = None, dict[str, Any]()
    for event in _events(reply):
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            text = choice.get("text") or choice.get("delta", {}).get("content") or ""
            logprobs = choice.get("logprobs") if top is not None else None
            tokens = tuple(_token(one, top or 0) for one in (logprobs or {}).get("content") or ())
            finish = choice.get("finish_reason") or finish
            if text or tokens:
                yield Piece(text=text, tokens=tokens)
    yield Piece(
        finish="length" if finish == "length" else "stop",
        tokens_in=int(usage.get("prompt_tokens", 0)),
        tokens_out=int(usage.get("completion_tokens", 0)),
    )


def _token(one: Mapping[str, Any], top: int) -> TokenLogprob:
    listed = tuple((str(other["token"]), float(other["logprob"])) for other in one["top_logprobs"][:top])
    return TokenLogprob(token=str(one["token"]), logprob=float(one["logprob"]), top=listed)
