"""Cuts questions and answers into messages of a stream, sends several in turn, and puts together what comes.

A question or an answer is a parcel of :mod:`lichen.federation.door`: a head, which is JSON, and a body of at most
16 MiB. It travels in messages of at most 1 MiB, each with the question's number; number 0 is what the two ends say of
the stream itself. Nothing waits in a queue of messages: they are cut when the stream takes them, from parcels whose
number is limited. Nothing here needs torch or gRPC.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import final

from lichen.core.errors import LichenError
from lichen.engines.remote.pieces import PIECE
from lichen.federation.door import Bytes, Head, open_parcel, parcel

__all__ = ["AT_ONCE", "MESSAGE", "Inbox", "Outbox"]

AT_ONCE = 32
"""Parcels of one stream that are on their way in one direction."""

_CHUNK = 1 << 20
_FRONT = struct.Struct("<cQ")
_TOTAL = struct.Struct("<I")
_FIRST, _MORE, _DROPPED = b"F", b"M", b"D"

MESSAGE = _CHUNK + _FRONT.size + _TOTAL.size
"""Bytes of a message at most."""

_WHOLE = 4 + (1 << 16) + PIECE
"""Bytes of a parcel at most."""


@final
class _Sending:
    """A parcel on its way out."""

    __slots__ = ("at", "data", "number")

    def __init__(self, number: int, data: bytes) -> None:
        self.number, self.data, self.at = number, memoryview(data), 0

    def message(self) -> bytes:
        """The next message of it."""
        part = self.data[self.at : self.at + _CHUNK]
        kind, total = (_MORE, b"") if self.at else (_FIRST, _TOTAL.pack(len(self.data)))
        self.at += len(part)
        return b"".join([_FRONT.pack(kind, self.number), total, part])

    def is_sent(self) -> bool:
        """Whether there is no next one."""
        return self.at == len(self.data)


@final
class Outbox:
    """What is to be sent over one stream; several threads may put."""

    def __init__(self) -> None:
        self._parcels: deque[_Sending] = deque()
        self._dropped: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, number: int, head: Head, body: Bytes = b"") -> None:
        """Send a parcel; at the end of the stream nothing.

        Raises:
            LichenError: if it is too long.
        """
        sending = _Sending(number, parcel(head, body))
        with self._changed:
            if not self._closed:
                self._parcels.append(sending)
                self._changed.notify()

    def say(self, head: Head) -> None:
        """Send a few words about the stream, unless some wait already: whoever does not read is not written to."""
        with self._changed:
            if any(one.number == 0 for one in self._parcels):
                return
        self.put(0, head)

    def drop(self, number: int) -> None:
        """Send nothing more of a parcel."""
        with self._changed:
            for one in self._parcels:
                if one.number == number:
                    self._parcels.remove(one)
                    if one.at:
                        self._dropped.append(number)
                        self._changed.notify()
                    return

    def waits(self) -> bool:
        """Whether something is still to be sent."""
        with self._changed:
            return bool(self._parcels or self._dropped)

    def close(self) -> None:
        """Send nothing more at all."""
        with self._changed:
            self._closed = True
            self._parcels.clear()
            self._dropped.clear()
            self._changed.notify()

    def messages(self) -> Iterator[bytes]:
        """Messages as the stream takes them, one of each parcel in turn, until it is closed."""
        while True:
            with self._changed:
                while not (self._parcels or self._dropped or self._closed):
                    self._changed.wait()
                if self._closed:
                    return
                if self._dropped:
                    message = _FRONT.pack(_DROPPED, self._dropped.popleft())
                else:
                    sending = self._parcels.popleft()
                    message = sending.message()
                    if not sending.is_sent():
                        self._parcels.append(sending)
            yield message


@final
class Inbox:
    """Puts together what comes over one stream; of one thread.

    Args:
        wants: Whether a parcel of this number is waited for; what nobody waits for any more is not gathered. It raises
            for a number that cannot be.
    """

    def __init__(self, wants: Callable[[int], bool]) -> None:
        self._wants = wants
        self._parts: dict[int, tuple[int, bytearray]] = {}

    def take(self, message: bytes) -> tuple[int, Head, memoryview] | None:
        """The number, head and body of the parcel that a message completes; None where it completes none.

        Raises:
            LichenError: if it is no message of this stream.
        """
        if not _FRONT.size <= len(message) <= MESSAGE:
            raise _nonsense("a message of a wrong length")
        kind, number = _FRONT.unpack_from(message)
        rest = memoryview(message)[_FRONT.size :]
        if kind == _DROPPED:
            self._parts.pop(number, None)
            return None
        expected = self._wants(number)
        if kind == _FIRST and len(rest) >= _TOTAL.size:
            (total,) = _TOTAL.unpack_from(rest)
            rest = rest[_TOTAL.size :]
            if total > _WHOLE or number in self._parts or len(self._parts) > AT_ONCE:
                raise _nonsense("more than a stream may have on its way")
            if not expected:
                return None
            self._parts[number] = (total, bytearray())
        elif kind != _MORE:
            raise _nonsense("bytes that are no message")
        if not expected:
            self._parts.pop(number, None)
            return None
        if number not in self._parts:
            raise _nonsense("the middle of what has no beginning")
        total, data = self._parts[number]
        data += rest
        if len(data) > total or not (rest or total == len(data)):
            raise _nonsense("more or less than was announced")
        if len(data) < total:
            return None
        del self._parts[number]
        return (number, *open_parcel(bytes(data)))


def _nonsense(what: str) -> LichenError:
    return LichenError(f"sent {what}", where="federation", fix="both ends must run the same version")
