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

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = ["Job", "Message", "concatenate", "pack_job", "pack_message", "size", "take", "unpack_job", "unpack_message"]


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
    return save(
        trees.plain(tensors), metadata={"lichen": json.dumps({"kind": f"{kind}/1", **header}, separators=(",", ":"))}
    )


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
    header = {"work": job.work, "base": job.base, "settings": sorted(job.settings), "texts": job.texts}
    numbers = {
        "version": torch.tensor(job.version),
        "clients": torch.tensor(job.clients, dtype=torch.int64),
        "seed": torch.tensor(job.seed),
        "settings": torch.tensor([job.settings[k] for k in sorted(job.settings)], dtype=torch.float64),
    }
    return _pack("job", header, {**_under("n.", numbers), **_under("s.", job.shared)})


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
    numbers = {"client": message.client_C, "version": message.version_C, "weight": message.weight_C}
    body = {**_under("n.", numbers), **_under("m.", message.metrics), **_under("t.", message.tensors)}
    return _pack("message", {"group": message.group, "texts": message.texts}, body)


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
    stands for all of a stacked message without texts.
    """
    if isinstance(thing, Job):
        return len(pack_job(replace(thing, clients=thing.clients[:1])))
    return len(pack_message(take(thing, 0)))
