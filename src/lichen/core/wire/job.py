"""What goes down: a job, and its bytes.

A job need not carry what its client has: where it names the ``snapshot`` that ``shared`` is, a client that
holds that view is sent no tensors, and one that holds an older one the steps from there.

A client learns with a job what became of its answers: where those since some version did not count, the job says from
which on, and the client goes on from the private state that it had then.

In a blob, ``i`` holds version, seed and clients, ``n`` the settings, ``x`` the texts, ``s.*`` the shared tensors
and ``d.<place>.*`` the steps, ``b`` who goes back and to which version; few tensors, since each one costs some seventy
bytes of names and places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, final

import torch
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.wire.blob import blob_size, pack_blob, unpack_blob
from lichen.core.wire.fields import MOST_CLIENTS, MOST_TEXT, decode_texts, encode_texts, require_tensor
from lichen.core.wire.shared import Shared

__all__ = ["MOST_DELTAS", "Job", "Link", "job_size", "link", "pack_job", "sizes", "unpack_job"]

MOST_DELTAS = 1 << 16
"""Steps of one job; a larger announcement is damage, not data."""

Link = Literal["full", "step", "same"]
"""How ``shared`` comes to a client: whole, as steps from a view it holds, or not at all."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the server asks of some clients.

    Attributes:
        work: Name of the client work to do, as the node knows it.
        shared: Shared tensors without client axis.
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
        rollback: By client, the version since which no answer of it has counted: what it has staged above that is no
            more. No entry where its last answer counted.
    """

    work: str
    shared: Shared
    version: int
    clients: tuple[int, ...]
    seed: int
    base: str = ""
    settings: Mapping[str, float] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    snapshot: str = ""
    deltas: tuple[tuple[str, dict[str, Tensor]], ...] = ()
    acked: Mapping[int, str] = field(default_factory=dict)
    rollback: Mapping[int, int] = field(default_factory=dict)


def link(job: Job) -> Link:
    """How ``shared`` comes to the clients of a job; "full" where they do not hold the same view.

    >>> job = Job(work="train", shared=Shared(), version=0, clients=(7, 8), seed=1, snapshot="b", deltas=(("a", {}),))
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
    return pack_blob("job", *_parts(job))


def job_size(job: Job) -> int:
    """``len(pack_job(job))``, without packing."""
    fields, tensors = _parts(job)
    return blob_size("job", fields, {name: (x.dtype, x.shape) for name, x in tensors.items()})


def sizes(job: Job) -> int:
    """Bytes that would cross for all clients of a job; of those that hold one view and go on alike, equally many.

    >>> job = Job(work="train", shared=Shared({"w": torch.ones(3)}), version=0, clients=(7, 8), seed=1)
    >>> sizes(job) == 2 * job_size(replace(job, clients=(7,)))
    True
    """
    alike: dict[tuple[str, int | None], list[int]] = {}
    for client in job.clients:
        alike.setdefault((job.acked.get(client, ""), job.rollback.get(client)), []).append(client)
    return sum(job_size(replace(job, clients=(some[0],))) * len(some) for some in alike.values())


def _parts(job: Job) -> tuple[dict[str, object], dict[str, Tensor]]:
    names = sorted(job.settings)
    fields: dict[str, object] = {"work": job.work, "base": job.base, "settings": names, "view": job.snapshot}
    body: dict[str, Tensor] = {"i": torch.tensor([job.version, job.seed, *job.clients], dtype=torch.int64)}
    if names:
        body["n"] = torch.tensor([job.settings[name] for name in names], dtype=torch.float64)
    if job.texts:
        fields["texts"], body["x"] = encode_texts(job.texts)
    if back := [(client, job.rollback[client]) for client in job.clients if client in job.rollback]:
        body["b"] = torch.tensor(back, dtype=torch.int64)
    how = link(job)
    if how == "full":
        return fields, {**body, **{f"s.{name}": x for name, x in job.shared.flat().items()}}
    fields["held"] = _acked(job)
    if how == "step":
        at = [before for before, _ in job.deltas].index(fields["held"])  # type: ignore[arg-type]
        fields["steps"] = len(job.deltas) - at
        for place, (_, payload) in enumerate(job.deltas[at:]):
            body.update({f"d.{place}.{name}": x for name, x in payload.items()})
    return fields, body


def unpack_job(data: bytes, *, most_text: int = MOST_TEXT) -> Job:
    """Undo :func:`pack_job`; ``shared`` is empty where only steps, or nothing, came.

    Args:
        data: What came. Read are a head of ``blob.MOST_HEAD`` bytes, ``fields.MOST_CLIENTS`` clients,
            ``fields.MOST_NAMES`` settings and ``MOST_DELTAS`` steps, at most.
        most_text: Bytes of all texts, at most.

    Raises:
        LichenError: if the bytes are damaged, of another kind or format, or beyond a bound.
    """
    fields, tensors = unpack_blob("job", data)
    try:
        fields.only("work", "base", "settings", "texts", "view", "held", "steps")
        version, seed, *clients = require_tensor(tensors.pop("i"), "i", torch.int64, 1).tolist()
        if version < 0 or min(clients, default=0) < 0 or len(clients) > MOST_CLIENTS:
            raise ValueError(f"version or a client is below 0, or there are more than {MOST_CLIENTS} clients")
        names, lengths = fields.names("settings"), fields.lengths("texts")
        numbers = require_tensor(tensors.pop("n"), "n", torch.float64, 1).tolist() if names else []
        texts = decode_texts(lengths, tensors.pop("x"), most_text) if lengths else ()
        acked, back = fields.text("held"), tensors.pop("b", torch.empty(0, 2, dtype=torch.int64))
        rollback = dict(require_tensor(back, "b", torch.int64, 2).tolist())
        if len(rollback) < len(back) or not rollback.keys() <= set(clients):
            raise ValueError("who goes back is no client of the job, or stands there twice")
        if any(not 0 <= before <= version for before in rollback.values()):
            raise ValueError("a client goes back to a version that is not before the job's")
        shared = {key[2:]: tensors.pop(key) for key in list(tensors) if key.startswith("s.")}
        deltas = _deltas(tensors, fields.count("steps", most=MOST_DELTAS if acked else 0))
        return Job(
            work=fields.text("work"),
            shared=Shared.of_flat(shared),
            version=version,
            clients=tuple(clients),
            seed=seed,
            base=fields.text("base"),
            settings=dict(zip(names, numbers, strict=True)),
            texts=texts,
            snapshot=fields.text("view"),
            deltas=tuple((acked if i == 0 else "", payload) for i, payload in enumerate(deltas)),
            acked=dict.fromkeys(clients, acked) if acked else {},
            rollback=rollback,
        )
    except (KeyError, ValueError) as error:
        raise LichenError(f"a field of the job is missing or wrong: {error}", where="job") from None


def _deltas(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The steps by their places; any other tensor is refused."""
    deltas: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, x in tensors.items():
        head, _, rest = key.partition(".")
        place, dot, name = rest.partition(".")
        if head != "d" or not dot or not (place.isascii() and place.isdecimal()) or place != str(int(place)):
            raise ValueError(f"unexpected tensor {key!r}")
        if int(place) >= count:
            raise ValueError(f"a tensor of step {place}, where there are {count} steps")
        deltas[int(place)][name] = x
    return deltas
