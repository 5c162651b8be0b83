"""What goes down within a job: the server's answer to what one client has asked, and its bytes.

In a blob, ``i`` holds which of the node's jobs it belongs to and whether that job is over for the client, and ``t.*``
the tensors, without client axis.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.wire.blob import blob_size, pack_blob, unpack_blob
from lichen.core.wire.fields import require_tensor

__all__ = ["answer_size", "pack_answer", "unpack_answer"]


def pack_answer(talk: int, answer: Mapping[str, Tensor] | None) -> bytes:
    """An answer's bytes.

    Args:
        talk: Which of the jobs that the node was sent, from 1.
        answer: The tensors; None: the job is over, and no answer comes any more.
    """
    numbers = torch.tensor([talk, int(answer is None)], dtype=torch.int64)
    return pack_blob("answer", {}, {"i": numbers, **{f"t.{name}": x for name, x in (answer or {}).items()}})


def answer_size(answer_C: Mapping[str, Tensor] | None) -> int:
    """``len(pack_answer(...))`` of one client of a stacked answer, without packing."""
    shapes = {f"t.{name}": (x.dtype, x.shape[1:]) for name, x in (answer_C or {}).items()}
    return blob_size("answer", {}, {**shapes, "i": (torch.int64, (2,))})


def unpack_answer(data: bytes) -> tuple[int, dict[str, Tensor] | None]:
    """Undo :func:`pack_answer`.

    Raises:
        LichenError: if the bytes are damaged, or of another kind or format.
    """
    fields, body = unpack_blob("answer", data)
    try:
        fields.only()
        numbers = require_tensor(body.pop("i"), "i", torch.int64, 1)
        if numbers.shape != (2,) or int(numbers[1]) not in (0, 1) or (body and int(numbers[1])):
            raise ValueError("there is more in it than an answer has")
        if other := [name for name in body if not name.startswith("t.")]:
            raise ValueError(f"unexpected tensor {min(other)!r}")
        return int(numbers[0]), None if int(numbers[1]) else {name[2:]: x for name, x in body.items()}
    except (KeyError, ValueError) as error:
        raise LichenError(f"a field of the answer is missing or wrong: {error}", where="answer") from None
