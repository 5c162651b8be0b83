"""How a federation stands as one page of this machine, and as numbers for Prometheus; off unless it is asked for.

It listens at 127.0.0.1 alone, and answers only who calls it by that name: a page of elsewhere that a browser has open
cannot read it. The page has no script, and nothing from elsewhere.
"""

from __future__ import annotations

import json
import threading
import time
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, final

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from lichen.core.errors import LichenError
from lichen.core.visible import visible
from lichen.federation.shown import HEADS, cells_of

__all__ = ["Page"]

HOST = "127.0.0.1"

_STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:left}tr.away{color:#999}"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

Rows = Sequence[Mapping[str, Any]]


@final
class Page:
    """A page of this machine.

    Args:
        port: Where it listens; 0: a free one.
        title: What it is of.
        rows: Every site, as :func:`lichen.federation.standing.standing` gives it.

    Attributes:
        port: Where it listens.

    Raises:
        LichenError: if the port is taken.
    """

    def __init__(self, port: int, *, title: str, rows: Callable[[], Rows]) -> None:
        handler = type("Handler", (_Handler,), {"title": title, "rows": staticmethod(rows)})
        try:
            self._server = ThreadingHTTPServer((HOST, port), handler)
        except OSError as error:
            what = f"the page's port cannot be used: {error.strerror}"
            raise LichenError(what, where=f"--page {port}", fix="choose another") from None
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler, ABC):
    """Answers one request; a page makes a kind of its own."""

    title: str
    rows: Callable[[], Rows]
    timeout = 10.0

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            return self._send(403, "text/plain", b"this page is for its own machine")
        if self.path == "/":
            return self._send(200, "text/html; charset=utf-8", page_of(self.title, self.rows(), time.time()).encode())
        if self.path == "/status.json":
            return self._send(200, "application/json", json.dumps(list(self.rows())).encode())
        if self.path == "/metrics":
            return self._send(200, "text/plain; version=0.0.4; charset=utf-8", metrics_of(self.rows()))
        self._send(404, "text/plain", b"there are /, /status.json and /metrics")

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", _POLICY),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads who looked."""


def page_of(title: str, rows: Rows, now: float) -> str:
    """The page."""
    head = "".join(f"<th>{escape(one)}</th>" for one in HEADS)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(visible(cell))}</td>" for cell in cells_of(row, now))
        lines.append(f"<tr{'' if row['there'] else ' class=away'}>{cells}</tr>")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=5>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<table><tr>{head}</tr>{''.join(lines)}</table></html>"
    )


def metrics_of(rows: Rows) -> bytes:
    """The numbers, as Prometheus reads them."""
    registry = CollectorRegistry()
    for key, about in (
        ("there", "Whether the site is connected."),
        ("last", "When the site was heard last, in seconds of the epoch."),
        ("clients", "Clients of the site in the run."),
        ("rows", "Rows of these clients."),
        ("round", "The round that the site is in."),
        ("bytes_up", "Bytes of the answers of the site in the run."),
        ("bytes_down", "Bytes of the jobs of the site in the run."),
    ):
        gauge = Gauge(f"lichen_site_{key}", about, ["site"], registry=registry)
        for row in rows:
            if key in row:
                gauge.labels(site=row["site"]).set(float(row[key]))
    return bytes(generate_latest(registry))
