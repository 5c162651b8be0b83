"""Clients that declare themselves: the roster is that of the nodes, in any blocks, and a lie is one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lichen.clients.distillation.teacher_labels import NoBatches
from lichen.clients.statistics.declare import Declare, enrol
from lichen.core.contracts.client import ClientTask
from lichen.core.errors import LichenError
from lichen.core.message import Job, pack_message, unpack_message
from lichen.core.replies import Reply
from lichen.core.roster import Member, Roster
from lichen.core.store import ClientStore
from lichen.engines.around import AroundEngine
from lichen.engines.local import LocalEngine

ROSTER = Roster(
    (
        Member(name="ward-3", rows={"train": 40, "valid": 5, "test": 5}, labels={"yes": 30, "no": 10}),
        Member(name="Łódź", rows={"train": 2, "valid": 0, "test": 1}, capacity=(4, None), group="tokens"),
        Member(name="c", rows={"train": 0, "valid": 0, "test": 0}),
    )
)


def wire(folder: Path, changes: dict[str, Any] | None = None, *, times: int = 1) -> AroundEngine:
    """The local engine, whose messages cross as bytes and come back changed, or as often as a liar likes."""

    def crossed(reply: Reply, job: Job) -> list[Reply]:
        assert reply.message is not None
        message = unpack_message(pack_message(reply.message))
        lies = {name: x(message) if callable(x) else x for name, x in (changes or {}).items()}
        return [replace(reply, message=replace(message, **lies))] * times

    tasks = {"roster": ClientTask(work=Declare(ROSTER), source=NoBatches())}
    return AroundEngine(LocalEngine(tasks, ClientStore(folder)), on_reply=crossed)


def test_the_server_learns_what_the_nodes_know(tmp_path: Path) -> None:
    found = enrol(wire(tmp_path))
    assert found == ROSTER
    assert found.digest() == ROSTER.digest()
    assert not list(tmp_path.rglob("*"))  # declaring leaves nothing at a node


def with_metric(name: str, value: float) -> dict[str, Any]:
    return {"metrics": lambda m: {**m.metrics, name: torch.full_like(m.metrics[name], value)}}


def with_texts(*texts: str) -> dict[str, Any]:
    return {"texts": lambda m: (texts,) * m.client_C.shape[0]}


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "negative rows": (with_metric("train", -3), "train rows of 'ward-3' is -3"),
    "rows that are no number": (with_metric("valid", float("nan")), "valid rows of 'ward-3' is nan, and no whole"),
    "half a row": (with_metric("test", 0.5), "is 0.5, and no whole number"),
    "endless rows": (with_metric("test", float("inf")), "is inf, and no whole number"),
    "no clients": (with_metric("clients", 0), "says that there are 0 clients"),
    "a billion clients": (with_metric("clients", 1e9), "says that there are 1,000,000,000 clients"),
    "one name for all": (with_texts("same", ""), "two clients have the name 'same'"),
    "a name with an escape": (with_texts("a\x1b[2J", ""), "is no name"),
    "a name of 10,000 letters": (with_texts("a" * 10_000, ""), "at most 200 letters"),
    "one text": (with_texts("a"), "in two texts"),
    "very much text": (with_texts("a", " " * (1 << 25)), "in two texts of bounded length"),
    "what is not JSON": (with_texts("a", "{"), "is not JSON"),
    "deep JSON": (with_texts("a", "[" * 100_000), "is not JSON"),
    "what is no mapping": (with_texts("a", "[1]"), "is no mapping"),
    "rows once more": (with_texts("a", '{"rows": {"train": 9}}'), "names them again"),
    "labels that are no number": (with_texts("a", '{"labels": {"yes": NaN}}'), "with label 'yes' is nan"),
    "another group": ({"group": "train"}, "a message of group 'train'"),
    "another client": ({"client_C": lambda m: m.client_C + 7}, "was not invited, or answers twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_clear_error(lie: str, tmp_path: Path) -> None:
    changes, message = LIES[lie]
    with pytest.raises(LichenError, match=message) as told:
        enrol(wire(tmp_path, changes))
    assert told.value.where == "roster"
    assert "\x1b" not in str(told.value)


def test_a_client_that_answers_twice_or_never_is_told(tmp_path: Path) -> None:
    with pytest.raises(LichenError, match="answers twice"):
        enrol(wire(tmp_path, times=2))
    with pytest.raises(LichenError, match=r"clients \[0\] have not declared themselves"):
        enrol(wire(tmp_path, times=0))
    liar = wire(tmp_path, {"metrics": lambda m: {**m.metrics, "clients": 3.0 + (m.client_C == 1).double()}})
    with pytest.raises(LichenError, match="'Łódź' knows 4 clients, client 0 knows 3"):
        enrol(liar)
