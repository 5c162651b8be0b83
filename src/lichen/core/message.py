"""What comes up: a message, its bytes, and the size of whatever crosses.

A :class:`Job` goes down, a :class:`Message` comes up; both pack into one blob. Numbers that differ by client (ids,
weights, metrics) are tensors there, so that every client of one group sends the same number of bytes. ``i`` holds ids
and versions, ``n`` the weight and all metrics of one number, ``x`` the texts, ``m.*`` other metrics and ``t.*`` the
tensors.

Legend: C clients, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree
from lichen.core.wire.blob import blob_size, pack_blob, unpack_blob
from lichen.core.wire.fields import MOST_CLIENTS, MOST_TEXT, decode_texts, encode_texts, require_tensor
from lichen.core.wire.job import Job, Link, job_size, link, pack_job, sizes, unpack_job

__all__ = [
    "LIFTED",
    "Job",
    "Link",
    "Message",
    "concatenate_messages",
    "is_lifted",
    "link",
    "pack_job",
    "pack_message",
    "size",
    "sizes",
    "take_client",
    "unpack_job",
    "unpack_message",
]

LIFTED = "lifted/"
"""In the name of a tensor that only lifted messages have."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What clients answer; always stacked, with C = 1 on a real node.

    Attributes:
        group: Only equal groups stack and sum: one architecture, one rank, one vocabulary.
        client_C: Roster indices, int64.
        version_C: The shared version each was trained on, int64.
        tensors: ``(C, ...)`` deltas, statistics, logits, votes.
        weight_C: Examples seen, float64.
        metrics: ``(C, ...)`` float64 sums and counts, for reports only.
        texts: Black-box payloads, one tuple a client.
    """

    group: str
    client_C: Tensor
    version_C: Tensor
    tensors: Tree
    weight_C: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    texts: tuple[tuple[str, ...], ...] = ()


def take_client(message: Message, position: int) -> Message:
    """The message of one client alone (C = 1), by position in the stack."""
    one = slice(position, position + 1)
    return replace(
        message,
        client_C=message.client_C[one],
        version_C=message.version_C[one],
        weight_C=message.weight_C[one],
        tensors={name: x[one] for name, x in message.tensors.items()},
        metrics={name: x[one] for name, x in message.metrics.items()},
        texts=message.texts[one],
    )


def is_lifted(message: Message) -> bool:
    """Whether it holds integers that only have to be added (:mod:`lichen.server.sums.lifted`), and no raw tensors."""
    return any(LIFTED in name for name in message.tensors)


def concatenate_messages(messages: Sequence[Message]) -> Message:
    """Stack messages of one group.

    Raises:
        LichenError: if the groups differ.
    """
    first = messages[0]
    for message in messages:
        if message.group != first.group:
            raise LichenError(f"group {message.group!r} does not stack with {first.group!r}", where="message")
    return replace(
        first,
        client_C=torch.cat([m.client_C for m in messages]),
        version_C=torch.cat([m.version_C for m in messages]),
        weight_C=torch.cat([m.weight_C for m in messages]),
        tensors=trees.concatenate([m.tensors for m in messages]),
        metrics=trees.concatenate([dict(m.metrics) for m in messages]),
        texts=tuple(text for m in messages for text in m.texts),
    )


def pack_message(message: Message) -> bytes:
    """A message's bytes."""
    fields, names, others = _parts(message)
    body = {"i": torch.stack([_long(message.client_C), _long(message.version_C)], 1)}
    columns = [message.weight_C, *(message.metrics[name] for name in names)]
    body["n"] = torch.stack([x.detach().cpu().double() for x in columns], 1)
    return pack_blob("message", fields, {**body, **others})


def _long(x_C: Tensor) -> Tensor:
    return x_C.detach().cpu().long()


def _parts(message: Message) -> tuple[dict[str, object], list[str], Tree]:
    """``(fields, names of the metrics beside the weight, all other tensors)``."""
    names = sorted(n for n, x in message.metrics.items() if x.dim() == 1 and x.dtype == torch.float64)
    fields: dict[str, object] = {"group": message.group, "metrics": names}
    body = trees.join("m.", {name: x for name, x in message.metrics.items() if name not in names}, {})
    body = trees.join("t.", message.tensors, body)
    if message.texts:
        lengths, body["x"] = encode_texts([text for texts in message.texts for text in texts])
        each = iter(lengths)
        fields["texts"] = [[next(each) for _ in texts] for texts in message.texts]
    return fields, names, body


def unpack_message(data: bytes, *, most_text: int = MOST_TEXT) -> Message:
    """Undo :func:`pack_message`.

    Args:
        data: What came. Read are a head of ``blob.MOST_HEAD`` bytes, ``fields.MOST_CLIENTS`` clients and
            ``fields.MOST_NAMES`` metrics, at most.
        most_text: Bytes of all texts, at most.

    Raises:
        LichenError: if the bytes are damaged, of another kind or format, or beyond a bound.
    """
    fields, body = unpack_blob("message", data)
    try:
        fields.only("group", "metrics", "texts")
        names = fields.names("metrics")
        ids_C2 = require_tensor(body.pop("i"), "i", torch.int64, 2)
        numbers_CM = require_tensor(body.pop("n"), "n", torch.float64, 2)
        count = ids_C2.shape[0]
        if ids_C2.shape != (count, 2) or numbers_CM.shape != (count, 1 + len(names)) or count > MOST_CLIENTS:
            shapes = f"ids {tuple(ids_C2.shape)} and numbers {tuple(numbers_CM.shape)}"
            raise ValueError(f"{shapes} do not match {len(names)} metrics of at most {MOST_CLIENTS} clients")
        if bool((ids_C2 < 0).any()):
            raise ValueError("a client or a version is below 0")
        texts = _texts(fields.lengths_C("texts", count), body, most_text)
        for name, x in body.items():
            if x.dim() == 0 or x.shape[0] != count:
                raise ValueError(f"tensor {name!r} of shape {tuple(x.shape)} lacks {count} clients")
        metrics, body = trees.split(body, "m.")
        tensors, body = trees.split(body, "t.")
        if body or metrics.keys() & set(names):
            raise ValueError(f"unexpected tensor {min([*body, *(metrics.keys() & set(names))])!r}")
        weight_C, *values = (x.clone() for x in numbers_CM.unbind(1))
        return Message(
            group=fields.text("group"),
            client_C=ids_C2[:, 0].clone(),
            version_C=ids_C2[:, 1].clone(),
            weight_C=weight_C,
            tensors=tensors,
            metrics={**dict(zip(names, values, strict=True)), **metrics},
            texts=texts,
        )
    except (KeyError, ValueError) as error:
        raise LichenError(f"a field of the message is missing or wrong: {error}", where="message") from None


def _texts(lengths_C: list[list[int]], body: Tree, most_text: int) -> tuple[tuple[str, ...], ...]:
    if not lengths_C:
        return ()
    each = iter(decode_texts([length for lengths in lengths_C for length in lengths], body.pop("x"), most_text))
    return tuple(tuple(next(each) for _ in lengths) for lengths in lengths_C)


def size(thing: Job | Message) -> int:
    """Bytes that would cross for one client: the job with one name on it, or one client's message.

    Clients of one group send the same number of bytes, save for their texts, so the first client
    stands for all of a stacked message without texts. The bytes are counted, not made.

    >>> from lichen.core.wire.shared import Shared
    >>> job = Job(work="train", shared=Shared({"w": torch.ones(3)}), version=0, clients=(7, 8), seed=1)
    >>> size(job) == len(pack_job(replace(job, clients=(7,))))
    True
    """
    if isinstance(thing, Job):
        return job_size(replace(thing, clients=thing.clients[:1]))
    fields, names, others = _parts(replace(thing, texts=thing.texts[:1]))
    shapes = {name: (x.dtype, x.shape if name == "x" else (1, *x.shape[1:])) for name, x in others.items()}
    ids, numbers = (torch.int64, (1, 2)), (torch.float64, (1, 1 + len(names)))
    return blob_size("message", fields, {**shapes, "i": ids, "n": numbers})
