"""Questions and answers of any length over a transport that carries 16 MiB at once.

What is longer goes in pieces. The other end gathers them, and says how many bytes it has: a piece that is sent twice
is gathered once, and whoever lost an answer goes on where it was. A digest of the whole is checked at the end. A long
answer stays at the site until it is fetched; few of either kind are there at once, so that memory is bounded. Two
pieces are on their way at a time: every process on it has one to work at.

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import final

from lichen.core.errors import LichenError
from lichen.engines.sites import SiteError, Sites

__all__ = ["PIECE", "Pieces", "ask_long"]

PIECE = 1 << 24
"""Bytes of one question or answer, with all that belongs to it."""

MOST = 1 << 36
"""Bytes of what is gathered; a longer announcement is damage, not data."""

_WHOLE, _LONG, _MISSING = b"w", b"l", b"m"
_PUT, _GET = "put", "get"
_HEAD = 1 + 32 + 8 + 8  # a mark, a digest, a length or a place, and a place
_DATA = PIECE - _HEAD
_AT_ONCE = 4
"""Long bodies of each kind that a site keeps."""
_ABREAST = 2
"""Pieces that are on their way at a time."""
_BEFORE = 2.0
"""Seconds that a piece waits at the site for the one before it."""
_TIMES = 4
"""How often a body is sent from its beginning, because the other end has lost it."""


@final
class _Gathered:
    """Bytes that come in parts; none is held twice."""

    def __init__(self) -> None:
        self._sink, self._length = io.BytesIO(), 0  # it gives its own bytes out, without a copy
        self._digest, self._worker = hashlib.sha256(), ThreadPoolExecutor(1)
        self._last = self._worker.submit(self._digest.update, b"")

    def __len__(self) -> int:
        return self._length

    def add(self, part: memoryview) -> None:
        """Take the next part."""
        self._length += self._sink.write(part)
        self._last.result()  # or parts would pile up
        self._last = self._worker.submit(self._digest.update, part)

    def whole(self) -> tuple[bytes, bytes]:
        """All of it, and its digest; no more can be added."""
        self._worker.shutdown()
        return self._sink.getvalue(), self._digest.digest()


def ask_long(sites: Sites, site: str, kind: str, body: bytes, within: float) -> bytes:
    """:meth:`Sites.ask <lichen.engines.sites.Sites.ask>` for a question and an answer of any length.

    Args:
        sites: Whose other end is a :class:`Pieces`.
        site: Whom.
        kind: What the question is.
        body: Its bytes.
        within: Seconds to wait for the answer to each piece.

    Raises:
        SiteError: if there is no answer, with the cause.
    """
    name = hashlib.sha256(body).digest() if len(body) > _DATA else b""
    for _ in range(_TIMES):
        if name:
            _send(sites, site, name, body, within)
        question = _LONG + name + len(body).to_bytes(8, "little") if name else _WHOLE + body
        answer = sites.ask(site, kind, question, within)
        if answer[:1] == _WHOLE:
            return answer[1:]
        if answer[:1] == _LONG and (whole := _receive(sites, site, answer, within)) is not None:
            return whole
        if answer[:1] not in (_LONG, _MISSING):
            break
    raise SiteError(site, "failed", LichenError("its answer came in no form that is known here", where=f"site {site}"))


@contextmanager
def _abreast(ask: Callable[[int], bytes], end: int) -> Iterator[Callable[[int], bytes]]:
    """Ask for what is at a place, and beforehand for what will be at the next ones, up to an end."""
    with ThreadPoolExecutor(_ABREAST) as pool:
        flight: deque[tuple[int, Future[bytes]]] = deque()

        def at(place: int) -> bytes:
            if flight and flight[0][0] != place:  # it does not go on where it was thought to
                for _, one in flight:
                    one.exception()
                flight.clear()
            ahead = flight[-1][0] + _DATA if flight else place
            while len(flight) < _ABREAST and ahead < end:
                flight.append((ahead, pool.submit(ask, ahead)))
                ahead += _DATA
            return flight.popleft()[1].result()

        yield at


def _send(sites: Sites, site: str, name: bytes, body: bytes, within: float) -> None:
    length, view, at, back = len(body).to_bytes(8, "little"), memoryview(body), 0, 0

    def put(place: int) -> bytes:
        piece = b"".join([name, length, place.to_bytes(8, "little"), view[place : place + _DATA]])
        return sites.ask(site, _PUT, piece, within)

    with _abreast(put, len(body)) as answer:
        while at < len(body):
            before, at = at, int.from_bytes(answer(at)[:8], "little")
            back += at <= before
            if back > _TIMES:
                what = f"it has {at:,} of {len(body):,} bytes, and does not get on"
                raise SiteError(site, "failed", LichenError(what, where=f"site {site}"))


def _receive(sites: Sites, site: str, answer: bytes, within: float) -> bytes | None:
    """The whole of a long answer; None where the site does not have it any more."""
    name, length = answer[1:33], int.from_bytes(answer[33:41], "little")
    gathered = _Gathered()
    gathered.add(memoryview(answer)[41:])

    def get(place: int) -> bytes:
        return sites.ask(site, _GET, name + place.to_bytes(8, "little"), within)

    with _abreast(get, length) as piece:
        while len(gathered) < length <= MOST:
            part = piece(len(gathered))
            if not part:
                return None
            gathered.add(memoryview(part))
    whole, digest = gathered.whole()
    if len(whole) != length or digest != name:
        what = LichenError(f"of {length:,} bytes came {len(whole):,}, or others", where=f"site {site}")
        raise SiteError(site, "failed", what)
    return whole


@final
class _Given:
    """A long answer, and how far it has been given out."""

    def __init__(self, whole: bytes) -> None:
        self.whole = whole
        self._left = set(range(_DATA, len(whole), _DATA))

    def at(self, place: int) -> tuple[bytes, bool]:
        """The piece at a place, and whether each has been given out once."""
        self._left.discard(place)
        return self.whole[place : place + _DATA], not self._left


@final
class Pieces:
    """A site's end: gathers long questions and gives long answers out, around what answers them; thread-safe.

    Args:
        answer: ``(kind, body)`` to an answer, of any length.
    """

    def __init__(self, answer: Callable[[str, bytes], bytes]) -> None:
        self._answer = answer
        self._lock = threading.Condition()
        self._in: dict[bytes, _Gathered] = {}
        self._out: dict[bytes, _Given] = {}

    def answer(self, kind: str, body: bytes) -> bytes:
        """The answer to a question of at most ``PIECE`` bytes, as long at most.

        Raises:
            LichenError: where the question is refused.
        """
        if kind == _PUT:
            return self._gather(body)
        if kind == _GET:
            with self._lock:
                given = self._out.get(body[:32])
                part, done = given.at(int.from_bytes(body[32:40], "little")) if given else (b"", True)
                if done:  # who loses the last piece asks the question again
                    self._out.pop(body[:32], None)
                return part
        if body[:1] == _LONG:
            with self._lock:
                gathered = self._in.get(body[1:33])
                if gathered is None or len(gathered) != int.from_bytes(body[33:41], "little"):
                    return _MISSING
                del self._in[body[1:33]]
            name, (body, digest) = body[1:33], gathered.whole()
            if digest != name:
                raise LichenError("its pieces have another digest than the whole", where="site", fix="send it again")
        else:
            body = body[1:]
        return self._given_out(self._answer(kind, body))

    def _gather(self, body: bytes) -> bytes:
        """Take a piece in; how many bytes are here now."""
        name, data = body[:32], memoryview(body)[48:]
        length, at = int.from_bytes(body[32:40], "little"), int.from_bytes(body[40:48], "little")
        if len(body) < 48 or length > MOST:
            raise LichenError(f"a piece of {length:,} bytes, {MOST:,} at most", where="site")
        with self._lock:
            so_far = self._in.setdefault(name, _Gathered())
            self._lock.wait_for(lambda: at <= len(so_far), timeout=_BEFORE)
            if at == len(so_far) and at + len(data) <= length:
                so_far.add(data)
                self._lock.notify_all()
            while len(self._in) > _AT_ONCE:
                del self._in[next(one for one in self._in if one != name)]
            return len(so_far).to_bytes(8, "little")

    def _given_out(self, answer: bytes) -> bytes:
        if len(answer) <= _DATA:
            return _WHOLE + answer
        name = hashlib.sha256(answer).digest()
        with self._lock:
            self._out[name] = _Given(answer)
            while len(self._out) > _AT_ONCE:
                del self._out[next(iter(self._out))]
        return b"".join([_LONG, name, len(answer).to_bytes(8, "little"), memoryview(answer)[:_DATA]])
