"""Jobs and messages between server and clients, and their size in bytes.

A :class:`Job` goes down, a :class:`Message` comes up. Both pack into one safetensors blob: the
tensors, plus a small text header for names. Numbers that differ by client (ids, weights, metrics)
are tensors too, so that every client of one group sends the same number of bytes. They share few
tensors, since each one costs some seventy bytes of names and places.

A job need not carry what its client has: where it names the ``snapshot`` that ``shared`` is, a client that
holds that view is sent no tensors, and one that holds an older one the steps from there.

Legend: C clients, M metrics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lichen.core import tree as trees
from lichen.core.errors import LichenError
from lichen.core.tree import Tree

__all__ = [
    "Job",
    "Link",
    "Message",
    "concatenate_messages",
    "link",
    "pack_job",
    "pack_message",
    "size",
    "sizes",
    "take_client",
    "unpack_job",
    "unpack_message",
]

FORMAT = 2
"""Of jobs and messages; both ends must agree."""

MOST_DELTAS = 1 << 16
"""Of one job; a larger announcement is damage, not data."""

Link = Literal["full", "step", "same"]
"""How ``shared`` comes to a client: whole, as steps from a view it holds, or not at all."""


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


@final
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
        snapshot: Digest of ``shared`` where clients are to remember it; empty where they are not.
        deltas: ``(snapshot before, what leads on)``, oldest first; the last leads to ``snapshot``.
        acked: The view each client holds already; no entry where it holds none. A job that came over
            the wire without ``shared`` holds its own steps alone, and they begin at this view.
    """

    work: str
    shared: Tree
    version: int
    clients: tuple[int, ...]
    seed: int
    base: str = ""
    settings: Mapping[str, float] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    snapshot: str = ""
    deltas: tuple[tuple[str, Tree], ...] = ()
    acked: Mapping[int, str] = field(default_factory=dict)


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


def _pack(kind: str, header: Mapping[str, object], tensors: Tree) -> bytes:
    # One metadata entry only: the writer does not promise an order for several, and bytes must repeat.
    return save(trees.plain(tensors), metadata={"lichen": _metadata(kind, header)})


def _metadata(kind: str, header: Mapping[str, object]) -> str:
    # What is empty is not written: every byte of this crosses with every message.
    written = {name: x for name, x in header.items() if x}
    return json.dumps({"kind": f"{kind}/{FORMAT}", **written}, separators=(",", ":"))


def _unpack(kind: str, data: bytes) -> tuple[dict[str, object], Tree]:
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lichen"])
        if header["kind"] != f"{kind}/{FORMAT}":
            raise LichenError(f"is a {header['kind']}, expected a {kind}/{FORMAT}", where="message")
        return header, load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise LichenError(
            f"these {len(data)} bytes are not a {kind}: {error}",
            where="message",
            fix="send it again; check both ends run the same version",
        ) from None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> Tree:
    return {prefix + name: x for name, x in tensors.items()}


def link(job: Job) -> Link:
    """How ``shared`` comes to the clients of a job; "full" where they do not hold the same view.

    >>> job = Job(work="train", shared={}, version=0, clients=(7, 8), seed=1, snapshot="b", deltas=(("a", {}),))
    >>> link(job), link(replace(job, acked={7: "a", 8: "a"})), link(replace(job, acked={7: "b", 8: "b"}))
    ('full', 'step', 'same')
    """
    acked = _acked(job)
    if acked == job.snapshot != "":
        return "same"
    return "step" if any(before == acked for before, _ in job.deltas) else "full"


def _acked(job: Job) -> str | None:
    """The view that all clients of a job hold, if it is one."""
    snapshots = {job.acked.get(client) for client in job.clients} if job.snapshot else set()
    return snapshots.pop() if len(snapshots) == 1 else None


def pack_job(job: Job) -> bytes:
    """A job's bytes, with as much of ``shared`` as its clients need."""
    return _pack("job", *_job_parts(job))


def _job_parts(job: Job) -> tuple[dict[str, object], Tree]:
    names = sorted(job.settings)
    header: dict[str, object] = {
        "work": job.work,
        "base": job.base,
        "settings": names,
        "texts": job.texts,
        "view": job.snapshot,
    }
    body: Tree = {"i": torch.tensor([job.version, job.seed, *job.clients], dtype=torch.int64)}
    if names:
        body["n"] = torch.tensor([job.settings[name] for name in names], dtype=torch.float64)
    how = link(job)
    if how == "full":
        body.update(_under("s.", job.shared))
        return header, body
    header["held"] = _acked(job)
    if how == "step":
        at = [before for before, _ in job.deltas].index(header["held"])  # type: ignore[arg-type]
        header["steps"] = len(job.deltas) - at
        for place, (_, payload) in enumerate(job.deltas[at:]):
            body.update(_under(f"d.{place}.", payload))
    return header, body


def unpack_job(data: bytes) -> Job:
    """Undo :func:`pack_job`; ``shared`` is empty where only steps, or nothing, came.

    Raises:
        LichenError: if the bytes are damaged or of another kind.
    """
    header, tensors = _unpack("job", data)
    try:
        version, seed, *clients = tensors["i"].tolist()
        names: list[str] = header.get("settings", [])  # type: ignore[assignment]
        numbers = tensors["n"].tolist() if names else []
        acked = header.get("held")
        shared, _ = trees.split(tensors, "s.")
        deltas = int(header.get("steps", 0))  # type: ignore[call-overload]
        if deltas > MOST_DELTAS:
            raise ValueError(f"{deltas} steps")
        payloads = [trees.split(tensors, f"d.{i}.")[0] for i in range(deltas)]
        return Job(
            work=str(header["work"]),
            shared=shared,
            version=int(version),
            clients=tuple(int(c) for c in clients),
            seed=int(seed),
            base=str(header.get("base", "")),
            settings=dict(zip(names, numbers, strict=True)),
            texts=tuple(header.get("texts", ())),  # type: ignore[arg-type]
            snapshot=str(header.get("view", "")),
            deltas=tuple((str(acked) if i == 0 else "", payload) for i, payload in enumerate(payloads)),
            acked={} if acked is None else {int(c): str(acked) for c in clients},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LichenError(f"the job lacks a field: {error}", where="message") from None


def pack_message(message: Message) -> bytes:
    """A message's bytes: ids as one tensor, the weight and all metrics of one number as another."""
    header, names, others = _message_parts(message)
    body = {"i": torch.stack([_long(message.client_C), _long(message.version_C)], 1)}
    columns = [message.weight_C, *(message.metrics[name] for name in names)]
    body["n"] = torch.stack([x.detach().cpu().double() for x in columns], 1)
    return _pack("message", header, {**body, **others})


def _long(x_C: Tensor) -> Tensor:
    return x_C.detach().cpu().long()


def _message_parts(message: Message) -> tuple[dict[str, object], list[str], Tree]:
    """``(header, names of the metrics beside the weight, all other tensors)``."""
    names = sorted(n for n, x in message.metrics.items() if x.dim() == 1 and x.dtype == torch.float64)
    others = {name: x for name, x in message.metrics.items() if name not in names}
    header: dict[str, object] = {"group": message.group, "metrics": names, "texts": message.texts}
    return header, names, {**_under("m.", others), **_under("t.", message.tensors)}


def unpack_message(data: bytes) -> Message:
    """Undo :func:`pack_message`.

    Raises:
        LichenError: if the bytes are damaged or of another kind.
    """
    header, body = _unpack("message", data)
    try:
        names: list[str] = header.get("metrics", [])  # type: ignore[assignment]
        ids_C2, numbers_CM = body.pop("i"), body.pop("n")
        count = ids_C2.shape[0]
        if ids_C2.shape != (count, 2) or numbers_CM.shape != (count, 1 + len(names)):
            mismatch = (
                f"ids {tuple(ids_C2.shape)} and numbers {tuple(numbers_CM.shape)} do not match {len(names)} metrics"
            )
            raise LichenError(mismatch, where="message")
        for name, x in body.items():
            if x.dim() == 0 or x.shape[0] != count:
                raise LichenError(f"tensor {name!r} of shape {tuple(x.shape)} lacks {count} clients", where="message")
        weight_C, *values = (x.clone() for x in numbers_CM.unbind(1))
        metrics, body = trees.split(body, "m.")
        tensors, _ = trees.split(body, "t.")
        return Message(
            group=str(header.get("group", "")),
            client_C=ids_C2[:, 0].clone(),
            version_C=ids_C2[:, 1].clone(),
            weight_C=weight_C,
            tensors=tensors,
            metrics={**dict(zip(names, values, strict=True)), **metrics},
            texts=tuple(tuple(text) for text in header.get("texts", ())),  # type: ignore[attr-defined]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
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
    header, names, others = _message_parts(replace(thing, texts=thing.texts[:1]))
    shapes = {name: (1, *x.shape[1:]) for name, x in others.items()}
    like = {"i": torch.empty(0, dtype=torch.int64), "n": torch.empty(0, dtype=torch.float64)}
    shapes |= {"i": (1, 2), "n": (1, 1 + len(names))}
    return _packed_size("message", header, shapes, {**like, **others})


def sizes(job: Job) -> int:
    """Bytes that would cross for all clients of a job; those that hold one view are sent equally many.

    >>> job = Job(work="train", shared={"w": torch.ones(3)}, version=0, clients=(7, 8), seed=1)
    >>> sizes(job) == 2 * size(job)
    True
    """
    alike: dict[str, list[int]] = {}
    for client in job.clients:
        alike.setdefault(job.acked.get(client, ""), []).append(client)
    return sum(size(replace(job, clients=(some[0],))) * len(some) for some in alike.values())


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
