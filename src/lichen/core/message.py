"""All that crosses between server and client, and its bytes.

A :class:`Job` goes down, a :class:`Message` comes up. Both pack into one safetensors blob: the
tensors, plus a small text header for names. Numbers that differ by client (ids, weights, metrics)
are tensors too, so that every client of one group sends the same number of bytes.

Legend: C clients.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["Job", "Message", "concatenate", "pack_job", "pack_message", "size", "take", "unpack_job", "unpack_message"]


_SAFETENSORS = {
    torch.bool: (0, "BOOL"),
    torch.uint8: (1, "U8"),
    torch.int8: (2, "I8"),
    torch.int16: (3, "I16"),
    torch.float16: (4, "F16"),
    torch.bfloat16: (5, "BF16"),
    torch.int32: (6, "I32"),
    torch.float32: (7, "F32"),
    torch.float64: (8, "F64"),
    torch.int64: (9, "I64"),
}
"""How the writer calls a dtype, and its rank: tensors lie by falling rank, then by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the server asks of some clients.

    Attributes:
        work: Name of the client work to do, as the node knows it.
        shared: Shared tensors without client axis: trainable ones under their own names, a patch of
            the frozen base under ``patch.``, a teacher's answers under ``answers.``.
        version: Number of server updates behind ``shared``.
        clients: Indices into the roster.
        seed: Seed of this round; clients derive theirs from it.
        base: Digest of the frozen base model the job was made for; empty where there is none.
        settings: Scalars for this round, such as the learning rate's factor ``lr_scale``.
        texts: Black-box payloads going down.
    """

    work: str
    shared: Tree
    version: int
    clients: tuple[int, ...]
    seed: int
    base: str = ""
    settings: Mapping[str, float] = field(default_factory=dict)
    texts: tuple[str, ...] = ()


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


def take(message: Message, position: int) -> Message:
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


def concatenate(messages: Sequence[Message]) -> Message:
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


def _pack(kind: str, header: Mapping[str, object], tensors: Tree) -> bytes:
    # One metadata entry only: the writer does not promise an order for several, and bytes must repeat.
    return save(trees.plain(tensors), metadata={"lichen": _metadata(kind, header)})


def _metadata(kind: str, header: Mapping[str, object]) -> str:
    return json.dumps({"kind": f"{kind}/1", **header}, separators=(",", ":"))


def _unpack(kind: str, data: bytes) -> tuple[dict[str, object], Tree]:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lichen"])
        if header["kind"] != f"{kind}/1":
            raise LichenError(f"is a {header['kind']}, expected a {kind}/1", where="message")
        return header, load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LichenError(
            f"these {len(data)} bytes are not a {kind}: {error}",
            where="message",
            fix="send it again; check both ends run the same version",
        ) from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tree:
    return {prefix + name: x for name, x in tensors.items()}


def pack_job(job: Job) -> bytes:
    """A job's bytes."""
    return _pack("job", *_job_parts(job))


def _job_parts(job: Job) -> tuple[dict[str, object], Tree]:
    header: dict[str, object] = {
        "work": job.work,
        "base": job.base,
        "settings": sorted(job.settings),
        "texts": job.texts,
    }
    numbers = {
        "version": torch.tensor(job.version),
        "clients": torch.tensor(job.clients, dtype=torch.int64),
        "seed": torch.tensor(job.seed),
        "settings": torch.tensor([job.settings[k] for k in sorted(job.settings)], dtype=torch.float64),
    }
    return header, {**_under("n.", numbers), **_under("s.", job.shared)}


def unpack_job(data: bytes) -> Job:
    """Undo :func:`pack_job`.

    Raises:
        LichenError: if the bytes are damaged or of another kind.
    """
    header, tensors = _unpack("job", data)
    try:
        shared, rest = trees.split(tensors, "s.")
        names: list[str] = header["settings"]  # type: ignore[assignment]
        return Job(
            work=str(header["work"]),
            shared=shared,
            version=int(rest["n.version"]),
            clients=tuple(rest["n.clients"].tolist()),
            seed=int(rest["n.seed"]),
            base=str(header["base"]),
            settings=dict(zip(names, rest["n.settings"].tolist(), strict=True)),
            texts=tuple(header["texts"]),  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LichenError(f"the job lacks a field: {error}", where="message") from None


def pack_message(message: Message) -> bytes:
    """A message's bytes."""
    return _pack("message", *_message_parts(message))


def _message_parts(message: Message) -> tuple[dict[str, object], Tree]:
    numbers = {"client": message.client_C, "version": message.version_C, "weight": message.weight_C}
    body = {**_under("n.", numbers), **_under("m.", message.metrics), **_under("t.", message.tensors)}
    return {"group": message.group, "texts": message.texts}, body


def unpack_message(data: bytes) -> Message:
    """Undo :func:`pack_message`.

    Raises:
        LichenError: if the bytes are damaged or of another kind.
    """
    header, body = _unpack("message", data)
    try:
        numbers, body = trees.split(body, "n.")
        metrics, body = trees.split(body, "m.")
        tensors, _ = trees.split(body, "t.")
        count = numbers["client"].shape[0]
        for name, x in {**numbers, **metrics, **tensors}.items():
            if x.dim() == 0 or x.shape[0] != count:
                raise LichenError(f"tensor {name!r} of shape {tuple(x.shape)} lacks {count} clients", where="message")
        return Message(
            group=str(header["group"]),
            client_C=numbers["client"],
            version_C=numbers["version"],
            weight_C=numbers["weight"],
            tensors=tensors,
            metrics=metrics,
            texts=tuple(tuple(text) for text in header["texts"]),  # type: ignore[attr-defined]
        )
    except (KeyError, TypeError) as error:
        raise LichenError(f"the message lacks a field: {error}", where="message") from None


def size(thing: Job | Message) -> int:
    """Bytes that would cross for one client: the job with one name on it, or one client's message.

    Clients of one group send the same number of bytes, save for their texts, so the first client
    stands for all of a stacked message without texts. The bytes are counted, not made.

    >>> job = Job(work="train", shared={"w": torch.ones(3)}, version=0, clients=(7, 8), seed=1)
    >>> size(job) == len(pack_job(replace(job, clients=(7,))))
    True
    """
    if isinstance(thing, Job):
        header, tensors = _job_parts(replace(thing, clients=thing.clients[:1]))
        return _packed_size("job", header, {name: x.shape for name, x in tensors.items()}, tensors)
    header, tensors = _message_parts(replace(thing, texts=thing.texts[:1]))
    return _packed_size("message", header, {name: (1, *x.shape[1:]) for name, x in tensors.items()}, tensors)


def _packed_size(kind: str, header: Mapping[str, object], shapes: Mapping[str, Sequence[int]], like: Tree) -> int:
    """``len(_pack(...))`` of tensors of these shapes, and of the dtypes of ``like``.

    The file is eight bytes, a JSON head filled up to a multiple of eight, and the numbers; the head
    gives each tensor's place, widest dtype first and then by name, so its length follows from their order.
    """
    if any(x.dtype not in _SAFETENSORS for x in like.values()):
        return len(_pack(kind, header, {name: x.new_empty(tuple(shapes[name])) for name, x in like.items()}))
    about: dict[str, object] = {"__metadata__": {"lichen": _metadata(kind, header)}}
    at = 0
    for name in sorted(like, key=lambda name: (-_SAFETENSORS[like[name].dtype][0], name)):
        _, code = _SAFETENSORS[like[name].dtype]
        end = at + prod(shapes[name]) * like[name].element_size()
        about[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    head = len(json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-head // 8) * 8 + at
