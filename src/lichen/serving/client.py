"""A plain client of an address in the OpenAI format that takes the time of each piece of an answer."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from lichen.core.errors import LichenError

__all__ = ["stream_chat"]


def stream_chat(url: str, body: dict[str, Any], *, timeout: float = 600.0) -> Iterator[tuple[float, dict[str, Any]]]:
    """``(seconds since the request was sent, event)`` of a streamed answer.

    Args:
        url: Up to the version.
        body: The request, without ``stream``.
        timeout: Seconds between two pieces at most.

    Raises:
        LichenError: if the server refuses or ends early.
    """
    parts = urlsplit(url)
    start = time.perf_counter()
    path = "/chat/completions" if "messages" in body else "/completions"
    link = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=timeout)
    try:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        link.request("POST", parts.path + path, body=data, headers={"Content-Type": "application/json"})
        reply = link.getresponse()
        if reply.status != 200:
            raise LichenError(
                f"refuses: {json.loads(reply.read())['error']['message']}", where=url, fix="ask otherwise"
            )
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise LichenError(str(event["error"]["message"]), where=url, fix="ask otherwise")
                yield time.perf_counter() - start, event
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise LichenError(f"ended early: {type(error).__name__}", where=url, fix="see that it runs") from None
    finally:
        link.close()
