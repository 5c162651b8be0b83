"""Messages and jobs that somebody changed and gave a right digest again are values or one error, in little memory.

``LICHEN_BLOBS=200000 python -m pytest tests/core/test_mutated_blobs.py -n 2`` looks at more than the suite does.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.core.test_blob import MESSAGE, SMALL

from lichen.core.collecting.admission import Admission
from lichen.core.errors import LichenError
from lichen.core.message import Job, Message, pack_job, pack_message, unpack_job, unpack_message
from lichen.core.replies import Reply
from lichen.core.wire.shared import Shared

BLOBS = int(os.environ.get("LICHEN_BLOBS", "6000"))
PARTS = 4
"""The blobs are shared out, so that two processes are both at work."""

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, -0.5, "", "x", "\ud800", "F32", "I64", "BF16", "U8", "C64",
    "F8_E8M0", [], [0], [-1], [2**62, 4], [1] * 40, {}, {"dtype": "F32"}, "message/3", "m.", "t.", "i", "n", "x" * 300,
)  # fmt: skip


_DIGEST = re.compile(rb'"lichen":"[a-z]+/\d+ ([0-9a-f]{32})')


def redigested(data: bytes) -> bytes:
    """The same with the digest that fits; as it is where there is no place for one."""
    found = _DIGEST.search(data, 8)
    if found is None:
        return data
    at, after = found.span(1)
    digest = hashlib.sha256(data[:at] + data[after:]).hexdigest()[:32].encode()
    return data[:at] + digest + data[after:]


def odd(draw: random.Random, value: Any) -> Any:
    """The same with one place changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(sorted(value))
        changed = dict(value)
        how = draw.random()
        if how < 0.15:
            del changed[name]
        elif how < 0.3:
            changed[str(draw.choice(ODD))] = changed.pop(name)
        else:
            changed[name] = odd(draw, value[name])
        return changed
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], odd(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.5:
        place = draw.randrange(len(value))
        return value[:place] + chr(draw.choice((0, 34, 48, 92, 127, 0x2028, 0x1F600))) + value[place + 1 :]
    return draw.choice(ODD)


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Other bytes, most with a digest that is right."""
    length = int.from_bytes(data[:8], "little")
    head, body = data[8 : 8 + length], data[8 + length :]
    how = draw.random()
    if how < 0.5:
        about = json.loads(head)
        kind, digits, fields = about["__metadata__"]["lichen"].split(" ", 2)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            if draw.random() < 0.5:
                fields = json.dumps(odd(draw, json.loads(fields)) if fields.startswith("{") else draw.choice(ODD))
            else:
                rest = odd(draw, {name: x for name, x in about.items() if name != "__metadata__"})
                about = {"__metadata__": about["__metadata__"], **(rest if isinstance(rest, dict) else {})}
        about["__metadata__"] = {"lichen": f"{kind} {digits} {fields}"}
        head = json.dumps(about, separators=(",", ":")).encode()
    elif how < 0.7 and head:
        place, many = draw.randrange(len(head)), draw.choice((0, 1, 1, 3))
        head = head[:place] + bytes(draw.randrange(256) for _ in range(many)) + head[place + draw.choice((0, 1, 4)) :]
    elif how < 0.85 and body:
        place = draw.randrange(len(body))
        body = body[:place] + bytes(draw.randrange(256) for _ in range(draw.choice((1, 8)))) + body[place + 1 :]
    else:
        body = draw.choice((body[: len(body) // 2], body + bytes(8), body * 2, b"", body[8:]))
    whole = len(head).to_bytes(8, "little") + head + body
    return redigested(whole) if draw.random() < 0.95 else whole


@pytest.mark.parametrize("part", range(PARTS))
def test_whatever_was_changed_is_a_value_or_one_error(part: int) -> None:
    draw, seen = random.Random(part), {"value": 0, "error": 0}
    names = sorted(SMALL)
    admission, job = Admission(), Job(work="w", shared=Shared(), version=3, clients=(4,), seed=0)
    for number in range(BLOBS // PARTS):
        data, unpack = SMALL[names[number % len(names)]]
        spoilt = mutated(draw, data)
        try:
            value = unpack(spoilt)
        except LichenError:
            seen["error"] += 1
            continue
        seen["value"] += 1
        if isinstance(value, Message):  # what can be read is admitted or refused by name
            reply = Reply(job=0, clients=tuple(value.client_C.tolist()), message=value)
            admission.admit(reply, job, None, set())
    assert min(seen.values()) > 0


def test_it_takes_less_memory_than_two_blobs() -> None:
    tensors = {f"layer.{i}": torch.randn(1, 4096) for i in range(16)}
    message, job = (
        pack_message(replace(MESSAGE, tensors=tensors)),
        pack_job(
            Job(
                work="train",
                shared=Shared({name: x[0] for name, x in tensors.items()}),
                version=3,
                clients=(4,),
                seed=1,
            )
        ),
    )
    kinds: tuple[tuple[bytes, Callable[[bytes], Any]], ...] = ((message, unpack_message), (job, unpack_job))
    draw = random.Random(9)
    for number in range(200):
        data, unpack = kinds[number % 2]
        spoilt = mutated(draw, data)
        tracemalloc.start()
        try:
            unpack(spoilt)
        except LichenError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        # Tensors lie in Python's memory, which is traced. A head takes a few kilobytes more than its text.
        assert peak < 2 * max(len(spoilt), len(data)), (number, peak)


def test_a_right_digest_makes_a_blob_whole_again() -> None:
    for data, unpack in SMALL.values():
        assert redigested(data) == data
        at = data.index(b" ", 8) + 1
        unpack(redigested(data[:at] + b"0" * 32 + data[at + 32 :]))
