"""What clients have sent that counted, on disk by round and client: to replay rounds, whole or without somebody.

Contribution (Shapley values by round) needs totals of any subset of clients, unlearning (FedEraser) the stored
changes round by round. Both fold what is read here into an aggregator again: sums are exact and know no order, so the
total of a round has its bytes, and that of a subset has the bytes of a round to which only these were invited.

The message of client 1234567 in round 3 is ``3/1234/567.safetensors``. Nobody else's bytes lie in that file, so that
forgetting a client is to delete files. All of it is private: files of mode 0600 in folders of 0700.

References:
    Gaoyang Liu, Xiaoqiang Ma, Yang Yang, Chen Wang and Jiangchuan Liu. "FedEraser: Enabling Efficient Client-Level
    Data Removal from Federated Learning Models." IWQoS 2021.
    Tianshu Song, Yongxin Tong and Shuyue Wei. "Profit Allocation for Federated Learning." IEEE Big Data 2019.

Legend: C clients.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol, final

import torch
from safetensors.torch import save
from torch import Tensor

from lichen.core.errors import LichenError
from lichen.core.files.durable import write_all
from lichen.core.message import Job, Message, pack_job, pack_message, take_client, unpack_job, unpack_message
from lichen.core.store import load_tree
from lichen.core.wire.shared import Shared

__all__ = ["History", "Retains"]

_FAN = 1000
"""Clients of one folder."""

_AT_ONCE = 64
"""Messages that are packed and open at once; no more are ever in memory."""

_END = ".safetensors"


class Retains(Protocol):
    """Is given the messages of a round that count, and then whether the round has made a step."""

    def put(self, round_: int, message: Message, job: Job) -> None: ...
    def retain(self, round_: int, clients: Collection[int]) -> None: ...


@final
class History:
    """Messages of finished rounds in a folder; nothing is remembered between calls.

    Several ranks may share a folder: each brings its own clients' messages. A round that a kill has ended is repeated,
    and its files are overwritten; :meth:`retain` removes those of clients that did not come again.

    Args:
        folder: Where the files lie; made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, round_: int, message: Message, job: Job) -> None:
        """Write what clients sent in a round, one file a client; a later message takes the place of a former.

        Args:
            round_: The round, from 0.
            message: What counts.
            job: What it answers; of it all but the tensors and texts that went down is written, too.
        """
        about = replace(job, shared=Shared(), texts=(), snapshot="", deltas=(), acked={})
        clients = message.client_C.tolist()
        for start in range(0, len(clients), _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, len(clients)))
            write_all(
                {
                    self._path(round_, clients[c]): save(
                        {
                            "job": _as_tensor(pack_job(replace(about, clients=(clients[c],)))),
                            "message": _as_tensor(pack_message(take_client(message, c))),
                        }
                    )
                    for c in some
                }
            )

    def retain(self, round_: int, clients: Collection[int]) -> None:
        """End a round: only these clients' messages stay, and nothing that a kill has left half written."""
        files = {self._path(round_, client) for client in clients}
        for path in list(self._files(str(round_))):
            if path not in files:
                with suppress(FileNotFoundError):  # another rank was faster
                    os.unlink(path)
        self._sweep(str(round_))

    def messages(
        self, clients: Collection[int] | None = None, rounds: Collection[int] | None = None
    ) -> Iterator[tuple[Message, Job]]:
        """Each message (C = 1) and its job without tensors, by round, then by client; one at a time is in memory.

        Args:
            clients: Whose; None: all.
            rounds: Of which rounds; None: all.

        Raises:
            LichenError: if a file is damaged.
        """
        for round_ in self.rounds():
            if rounds is not None and round_ not in rounds:
                continue
            for client in self.clients(round_):
                if clients is None or client in clients:
                    yield _read(Path(self._path(round_, client)))

    def rounds(self) -> list[int]:
        """The rounds of which there are messages, ascending."""
        return [round_ for round_ in _numbers(str(self.folder)) if self.clients(round_)]

    def clients(self, round_: int) -> list[int]:
        """Whose messages of a round there are, ascending."""
        folder = f"{self.folder}/{round_}"
        return [
            thousand * _FAN + rest for thousand in _numbers(folder) for rest in _numbers(f"{folder}/{thousand}", _END)
        ]

    def forget(self, client: int) -> None:
        """Delete all that this client has sent; its bytes and its number are in no other file.

        What the file system had on its disk before is not overwritten.
        """
        for round_ in _numbers(str(self.folder)):
            for path in list(self._files(f"{round_}/{client // _FAN}")):
                name = os.path.basename(path).lstrip(".")
                if name.partition(".")[0] == str(client % _FAN):
                    os.unlink(path)
            self._sweep(str(round_))

    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(os.path.getsize(path) for path in self._files(""))

    def _path(self, round_: int, client: int) -> str:
        return f"{self.folder}/{round_}/{client // _FAN}/{client % _FAN}{_END}"

    def _files(self, inside: str) -> Iterator[str]:
        """Every file, also those that a kill has left half written."""
        for folder, _, names in os.walk(f"{self.folder}/{inside}" if inside else self.folder):
            yield from (f"{folder}/{name}" for name in names)

    def _sweep(self, inside: str) -> None:
        """Remove folders in which nothing is left."""
        for folder, _, _ in os.walk(f"{self.folder}/{inside}", topdown=False):
            with suppress(OSError):
                os.rmdir(folder)


def _numbers(folder: str, end: str = "") -> list[int]:
    """The names in a folder that are numbers and this end."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(stem) for name in names if name.endswith(end) and (stem := name.removesuffix(end)).isdecimal())


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _read(path: Path) -> tuple[Message, Job]:
    tree, _ = load_tree(path)
    try:
        return unpack_message(tree["message"].numpy().tobytes()), unpack_job(tree["job"].numpy().tobytes())
    except (KeyError, LichenError) as error:
        raise LichenError(
            f"is damaged: {error}", where=str(path), fix="delete it, or start without this history"
        ) from None
