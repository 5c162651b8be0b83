"""HTTP at one address of this machine, for one model.

The standard library carries it: a thread a connection, one request a connection. A request has a minute to arrive as a
whole, so that nobody holds a connection by sending a letter at a time; a client that does not read is left after
another. So many connections are served at once, and whoever comes beyond them is told so. Nothing that is asked or
answered is written anywhere.
"""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
import time
from abc import ABC
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.machine import machine_fault
from lichen.serving.contract import ApiError, ServedModel
from lichen.serving.guard import check_head, require_key
from lichen.serving.service import Service
from lichen.serving.wire import error_body

__all__ = ["Limits", "ModelServer"]

_DRAIN = 1 << 26
"""Bytes of a body that was refused which are still read, so that its sender comes to read why."""
_LATER = 5.0
"""Seconds that a socket's own timeout comes after the end of waiting, which says why."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may take.

    Attributes:
        body: Bytes of a body.
        arrive: Seconds in which a request must be there, and in which a piece of an answer must be read.
        connections: Clients at once.
    """

    body: int = 4 << 20
    arrive: float = 60.0
    connections: int = 64


@final
class ModelServer:
    """A model behind an address, until it is closed.

    Args:
        model: The model; it is not closed with the server.
        host: Where it listens.
        port: Where it listens; 0: a free one.
        key: What clients must know; empty: nothing, which only addresses of this machine may have.
        delay: Seconds that each request waits, in place of a network's there and back; 0 but for measuring.
        limits: What a client may take.

    Attributes:
        port: Where it listens.
        url: Its address, up to the version.

    Raises:
        LichenError: if the port is taken, the address is none of this machine's, or others could reach it without a
            key.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        key: str = "",
        delay: float = 0.0,
        limits: Limits | None = None,
    ) -> None:
        require_key(host, key)
        limits = limits or Limits()
        body = {"service": Service(model), "key": key, "delay": delay, "limits": limits, "host": host}
        handler = type("Handler", (_Handler,), {**body, "timeout": limits.arrive + _LATER})
        try:
            self._server = _server_for(host)((host, port), handler, bind_and_activate=True)
        except (OSError, OverflowError, UnicodeError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            fix = "choose another port, 0 for a free one, or an address of this machine"
            raise LichenError(f"cannot listen: {reason}", where=f"{host}:{port}", fix=fix) from None
        self._server.slots = threading.BoundedSemaphore(limits.connections)
        self.port = int(self._server.server_address[1])
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more; requests under way are left alone with the process."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer, ABC):
    """Connections up to a number."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128
    slots: threading.BoundedSemaphore

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without looking a name up, which may ask a network
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        error = ApiError(503, "too many requests at once: try again later", kind="server_error", code="busy")
        with suppress(OSError):
            request.settimeout(1.0)
            request.sendall(_plain_reply(error))
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is nobody's concern but its client's."""


@final
class _Server4(_Server):
    address_family = socket.AF_INET


@final
class _Server6(_Server):
    address_family = socket.AF_INET6


def _server_for(host: str) -> type[_Server4 | _Server6]:
    return _Server6 if ":" in host else _Server4


class _Handler(BaseHTTPRequestHandler, ABC):
    """Answers one request; a server makes a kind of its own."""

    service: Service
    key: str
    host: str
    delay: float
    limits: Limits
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # or what cannot be read would be answered without a head
    server_version = "lichen"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self._late = False
        self._begun = False
        self._timer = threading.Timer(self.limits.arrive, self._end_waiting)
        self._timer.daemon = True
        self._timer.start()

    def _end_waiting(self) -> None:
        """The request is not there in time: what waits for more of it finds its end."""
        self._late = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def finish(self) -> None:
        self._timer.cancel()
        with suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.close_connection = True
        try:
            if self._late:  # and what has a head may have lost the rest of it
                raise ApiError(408, "the request did not arrive in time", code="timeout")
            names = [name.lower() for name, _ in self.headers.items()]
            if len(names) != len(set(names)):
                raise ApiError(400, "a field of the head is there twice")
            port = int(self.connection.getsockname()[1])
            check_head(self.headers, self.host, port, self.key)
            path = self.path.partition("?")[0]
            if not body:
                self._timer.cancel()
                reply: Any = self.service.get(path)
            else:
                data = self._body()
                self._timer.cancel()
                time.sleep(self.delay)  # before anything is computed, or it would hide behind that
                reply = self.service.post(path, data)
            self._send(reply)
        except ApiError as error:
            self._refuse(error)
        except OSError:
            if self._late and not self._begun:
                self._refuse(ApiError(408, "the request did not arrive in time", code="timeout"))
        except Exception as error:
            self._refuse(_fault(error))

    def _body(self) -> bytes:
        """The whole body.

        Raises:
            ApiError: if it has no length, is too long, or does not come.
        """
        if "Transfer-Encoding" in self.headers:
            raise ApiError(411, "a body is sent with Content-Length, not in chunks")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ApiError(411, "a body needs its Content-Length, in bytes")
        if int(length) > self.limits.body:
            raise ApiError(413, f"the body has more than {self.limits.body} bytes")
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "a body is sent as Content-Type: application/json")
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            late = self._late
            what = "the request did not arrive in time" if late else "the body is shorter than its Content-Length"
            raise ApiError(408 if late else 400, what, code="timeout" if late else "")
        return data

    def _send(self, reply: dict[str, Any] | Generator[bytes, None, None]) -> None:
        if isinstance(reply, dict):
            data = json.dumps(reply, ensure_ascii=False, allow_nan=False).encode()
            self._head(200, "application/json", len(data))
            self.wfile.write(data)
            return
        try:
            self._head(200, "text/event-stream", None)
            for event in reply:
                self.wfile.write(event)
        finally:
            reply.close()

    def _head(self, status: int, kind: str, length: int | None) -> None:
        self._begun = True
        self.send_response(status)
        fields = {"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        fields |= {} if length is None else {"Content-Length": str(length)}
        for name, value in {**fields, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, error: ApiError) -> None:
        """Say why not, and read what is still being sent, so that its sender comes to see it."""
        with suppress(OSError):
            data = json.dumps(error_body(error), ensure_ascii=False).encode()
            if self._begun:  # an answer has begun: this is its last event
                self.wfile.write(b"data: " + data + b"\n\n")
                return
            self._head(error.status, "application/json", len(data))
            self.wfile.write(data)
            self.connection.shutdown(socket.SHUT_WR)
            self._drain()

    def _drain(self) -> None:
        over, left = time.monotonic() + self.limits.arrive, _DRAIN
        self.connection.settimeout(min(1.0, self.limits.arrive))
        while left > 0 and time.monotonic() < over and (some := self.rfile.read1(65536)):
            left -= len(some)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself, in the format of all other errors."""
        del explain
        self.close_connection = True
        code = {501: 405, 505: 400}.get(int(code), int(code))  # it is the request that is wrong
        if self._late:
            code, message = 408, "the request did not arrive in time"
        self._refuse(ApiError(code, message or "the request cannot be read"))

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads who asked for what."""


def _fault(error: Exception) -> ApiError:
    """A fault of our own or of the machine, in a sentence that holds nothing of what was asked."""
    refused = machine_fault(error)
    what = f"the server failed: {type(error).__name__}" if refused is None else refused.what
    print(what, file=sys.stderr, flush=True)
    return ApiError(500, what, kind="server_error")


def _plain_reply(error: ApiError) -> bytes:
    data = json.dumps(error_body(error)).encode()
    head = f"HTTP/1.1 {error.status} Busy\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + data
