"""Calls an endpoint with retries and a rate limit, and keeps its key secret.

Calls that fail with a timeout, a cut body, 429 or 5xx are made again after a growing pause, spread by what is
asked, and no sooner than the endpoint says (``Retry-After``). A call has one limit for all it takes, from connecting
to the last byte. Sockets go to the one endpoint alone: no proxy and no redirect is followed. The key is read from an
environment variable when it is needed and is neither kept nor shown.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, final
from urllib.parse import urlsplit

from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.core.visible import clipped
from lichen.fm.endpoint import Endpoint
from lichen.fm.response import read_object

__all__ = ["Caller"]

_MOST = 1 << 26  # bytes of one answer
_RETRY_CODES = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST = 600.0
"""Seconds that an endpoint may ask to be left alone for; beyond it nobody would wait."""


@final
class Caller:
    """Posts to one endpoint; any number of threads may use it.

    Args:
        endpoint: Where and how.
        sleep: Waits so many seconds.
        again: Called before every call that is made again.
    """

    def __init__(self, endpoint: Endpoint, *, sleep: Callable[[float], None], again: Callable[[], None]) -> None:
        self.endpoint = endpoint
        self._sleep, self._again = sleep, again
        self._lock = threading.Lock()
        self._next = 0.0
        self._ssl = ssl.create_default_context() if endpoint.url.startswith("https:") else None

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The object the endpoint answers with.

        Raises:
            LichenError: if it refuses, stays silent after all tries, or the environment lacks the key.
        """
        url = self.endpoint.url.rstrip("/") + path
        data = json.dumps(body, sort_keys=True).encode()
        digest = hashlib.sha256(url.encode() + b"\n" + data).hexdigest()
        reason, not_before = "", 0.0
        for attempt in range(self.endpoint.max_retries + 1):
            if attempt:
                self._again()
                # Spread by what is asked, so that calls that failed together do not come back together.
                pause = self.endpoint.pause * 2 ** (attempt - 1) * (1 + derive(attempt, digest) / 2**63)
                self._sleep(max(pause, not_before))
            self._wait()
            headers = self._headers()
            try:
                status, why, later, read = self._call(url, data, headers)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason, not_before = f"{type(error).__name__}: {error}", 0.0
                continue
            if 200 <= status < 300:
                if len(read) > _MOST:
                    raise LichenError("the answer is too long", where=f"endpoint {url}", fix="ask for less at once")
                try:
                    return read_object(read)
                except ValueError as error:
                    reason, not_before = str(error), 0.0
                    continue
            reason, not_before = f"{status} {why}", _seconds(later)
            if status not in _RETRY_CODES:
                raise LichenError(
                    f"refuses: {clipped(reason, 200)}",
                    where=f"endpoint {url}",
                    fix="check endpoint.url, model and api_key_env",
                )
            if not_before > _LONGEST:
                raise LichenError(
                    f"asks to be left alone for {not_before:.0f} seconds: {clipped(reason, 200)}",
                    where=f"endpoint {url}",
                    fix="come back then; what it has answered is kept",
                )
        raise LichenError(
            f"gave no answer in {self.endpoint.max_retries + 1} tries, at last: {clipped(reason, 200)}",
            where=f"endpoint {url}",
            fix="check that it runs, or raise endpoint.timeout or max_retries",
        )

    def _call(self, url: str, data: bytes, headers: Mapping[str, str]) -> tuple[int, str, str, bytes]:
        """``(status, reason, Retry-After, body)`` of one call.

        A socket's own timeout is for each piece that comes: a server that drips would be waited for without end. So
        the socket is shut when the time of the call is over.
        """
        parts, limit = urlsplit(url), self.endpoint.timeout
        host, port = str(parts.hostname), parts.port
        make = http.client.HTTPConnection(host, port, timeout=limit)
        if self._ssl is not None:
            make = http.client.HTTPSConnection(host, port, timeout=limit, context=self._ssl)
        over = threading.Event()

        def shut() -> None:
            over.set()
            with suppress(OSError, AttributeError):
                make.sock.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(limit, shut)
        watch.daemon = True
        watch.start()
        try:
            make.request("POST", parts.path, body=data, headers=dict(headers))
            reply = make.getresponse()
            read = reply.read(_MOST + 1)
            if over.is_set():
                raise TimeoutError(f"took more than {limit:g} seconds")
            return reply.status, reply.reason, reply.getheader("Retry-After") or "", read
        except (OSError, http.client.HTTPException):
            if over.is_set():
                raise TimeoutError(f"took more than {limit:g} seconds") from None
            raise
        finally:
            watch.cancel()
            make.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if name := self.endpoint.api_key_env:
            if not (key := os.environ.get(name)):
                raise LichenError(
                    f"the environment has no {name}", where=f"{self.endpoint.place}.api_key_env", fix=f"export {name}"
                )
            if any(not 32 < ord(letter) < 127 for letter in key.strip()):
                raise LichenError(
                    "the key holds a blank, a line break or a letter that no header may",
                    where=f"{self.endpoint.place}.api_key_env",
                    fix=f"put the bare key into {name}",
                )
            headers["Authorization"] = f"Bearer {key.strip()}"
        return headers

    def _wait(self) -> None:
        if self.endpoint.rate_limit is None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 1 / self.endpoint.rate_limit
        if turn > now:
            self._sleep(turn - now)


def _seconds(later: str) -> float:
    """What ``Retry-After`` says, as seconds or a date; 0 for what cannot be read."""
    with suppress(ValueError):
        return max(0.0, float(int(later)))
    with suppress(ValueError, TypeError, OverflowError):
        when = parsedate_to_datetime(later)
        return max(0.0, (when - datetime.now(UTC if when.tzinfo else None)).total_seconds())
    return 0.0
