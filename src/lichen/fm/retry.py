"""Calls an endpoint with retries and a rate limit, and keeps its key secret.

Calls that fail with a timeout, a cut body, 429 or 5xx are made again after a growing pause, spread by what is
asked. Sockets go to the one endpoint alone: no proxy and no redirect is followed. The key is read from an
environment variable when it is needed and is neither kept nor shown.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.core.seeds import derive
from lichen.fm.endpoint import Endpoint

__all__ = ["Caller"]

_MOST = 1 << 26  # bytes of one answer
_RETRY_CODES = (408, 409, 425, 429, 500, 502, 503, 504)


@final
class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


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
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect()).open

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The object the endpoint answers with.

        Raises:
            LichenError: if it refuses, stays silent after all tries, or the environment lacks the key.
        """
        url = self.endpoint.url.rstrip("/") + path
        data = json.dumps(body, sort_keys=True).encode()
        digest = hashlib.sha256(url.encode() + b"\n" + data).hexdigest()
        reason = ""
        for attempt in range(self.endpoint.max_retries + 1):
            if attempt:
                self._again()
                # Spread by what is asked, so that calls that failed together do not come back together.
                self._sleep(self.endpoint.pause * 2 ** (attempt - 1) * (1 + derive(attempt, digest) / 2**63))
            self._wait()
            request = urllib.request.Request(url, data=data, headers=self._headers())
            try:
                with self._open(request, timeout=self.endpoint.timeout) as reply:
                    read = reply.read(_MOST + 1)
                if len(read) > _MOST:
                    raise LichenError("the answer is too long", where=f"endpoint {url}", fix="ask for less at once")
                found = json.loads(read)
                if isinstance(found, dict):
                    return found
                reason = "the answer is no object"
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"{error.code} {error.reason}"
                    if error.code not in _RETRY_CODES:
                        raise LichenError(
                            f"refuses: {reason}",
                            where=f"endpoint {url}",
                            fix="check endpoint.url, model and api_key_env",
                        ) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
        raise LichenError(
            f"gave no answer in {self.endpoint.max_retries + 1} tries, at last: {reason}",
            where=f"endpoint {url}",
            fix="check that it runs, or raise endpoint.timeout or max_retries",
        )

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if name := self.endpoint.api_key_env:
            if not (key := os.environ.get(name)):
                raise LichenError(
                    f"the environment has no {name}", where=f"{self.endpoint.place}.api_key_env", fix=f"export {name}"
                )
            headers["Authorization"] = f"Bearer {key}"
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
