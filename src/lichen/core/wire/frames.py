"""What crosses between a server and a node, as bytes in order: a frame is a kind, a length and a body.

The kind is one byte, the length eight, little endian. Nothing here needs torch.

=====  ====================================================
``J``  a job, server to node
``M``  a message, node to server
``Q``  a question within a job, node to server
``A``  its answer, server to node
``.``  the job is done, node to server (empty)
``E``  the job failed, node to server (JSON: what, where, fix)
``?``  a question to a site, on a pipe to its process, or at a door
``!``  what the site answers, on the way back
=====  ====================================================

The first six lie within the last two: a site is handed one frame, and what comes of it is fetched as several.
"""

from __future__ import annotations

import io
import json
from typing import BinaryIO

from lichen.core.errors import LichenError

__all__ = ["Frame", "frame_head", "pack_error", "read_body", "read_frame", "read_head", "unpack_error", "write_frame"]

Frame = tuple[bytes, bytes]
"""A kind and a body."""

MAX_FRAME = 1 << 36
"""Bytes of a body at most, if a reader says nothing else."""

KINDS = (b"J", b"M", b"Q", b"A", b".", b"E", b"?", b"!")

PIECE = 1 << 20
"""Bytes read at once."""

REASONS = frozenset({"declined", "machine"})
"""Words for the reason of an error that a node may give with it; any other is not listened to."""

ERROR = 1 << 14
"""Bytes of a node's error that are read."""


def frame_head(kind: bytes, length: int) -> bytes:
    """What stands before a frame's body."""
    return kind + length.to_bytes(8, "little")


def write_frame(stream: BinaryIO, kind: bytes, *body: bytes | memoryview) -> None:
    """Write one frame, whose body may come in parts, and flush it."""
    stream.write(frame_head(kind, sum(map(len, body))))
    for part in body:  # each as it is: a part may be large, and is not copied
        stream.write(part)
    stream.flush()


def read_frame(stream: BinaryIO, *, most: int = MAX_FRAME) -> Frame | None:
    """``(kind, body)`` of the next frame; None at a clean end.

    Args:
        stream: To read from.
        most: Bytes of a body; a longer announcement is damage, not data.

    Raises:
        LichenError: if the stream ends inside a frame or announces nonsense.
    """
    head = read_head(stream, most=most)
    return None if head is None else (head[0], read_body(stream, head[1]))


def read_head(stream: BinaryIO, *, most: int = MAX_FRAME) -> tuple[bytes, int] | None:
    """The kind of the next frame and the length of its body, which :func:`read_body` reads; see :func:`read_frame`."""
    head = _read(stream, 9)
    if not head:
        return None
    length = int.from_bytes(head[1:], "little")
    if len(head) < 9 or head[:1] not in KINDS or length > most:
        raise LichenError(f"{head.hex()} is not the head of a frame", where="wire", fix="both ends must run lichen")
    return head[:1], length


def read_body(stream: BinaryIO, length: int) -> bytes:
    """So many bytes of a frame's body.

    Raises:
        LichenError: if the stream ends before.
    """
    body = _read(stream, length)
    if len(body) < length:
        raise LichenError(f"the stream ended after {len(body)} of {length} bytes", where="wire")
    return body


def _read(stream: BinaryIO, count: int) -> bytes:
    sink = io.BytesIO()  # gives its own bytes out, where a join would hold all of them twice
    # In pieces: a pipe's reader sets aside what it is asked for, and the announced length may be damage.
    while count and (part := stream.read(min(count, PIECE))):
        sink.write(part)
        count -= len(part)
    return sink.getvalue()


def pack_error(error: LichenError) -> bytes:
    """The body of an ``E`` frame."""
    reason = [error.reason] if error.reason else []
    return json.dumps([error.what, error.where, error.fix, *reason]).encode()


def unpack_error(body: bytes) -> LichenError:
    """What a node says of itself; where it says nonsense, that."""
    try:
        what, where, fix, *reason = json.loads(body[:ERROR])
        known = reason[0] if reason and reason[0] in REASONS else ""
        return LichenError(str(what), where=f"node: {where}" if where else "node", fix=str(fix), reason=known)
    except (ValueError, TypeError, RecursionError):
        return LichenError(f"said: {body[:ERROR].decode(errors='replace')}", where="node")
